//! `tmctl token`: enrollment tokens.

use tm_api::token::{CreateToken, NewToken, TokenView};
use tm_protocol::token::EnrollmentToken;

use crate::{
    cli::Token,
    client::Client,
    desk::{Desk, DeskError},
    failure::{Exit, Failure},
    output::{Column, Format, Output, say},
};

const COLUMNS: [Column<TokenView>; 8] = [
    Column::id("id", |t| t.id.clone()),
    Column::narrow("state", |t| t.state.clone()),
    Column::narrow("used", |t| t.used.to_string()),
    Column::narrow("uses", |t| t.uses.to_string()),
    Column::narrow("group", |t| t.group.clone()),
    Column::time("expires_at", |t| t.expires_at.clone()),
    Column::narrow("created_by", |t| t.created_by.clone()),
    Column::wide_time("created_at", |t| t.created_at.clone()),
];

const NEW: [Column<NewToken>; 5] = [
    Column::id("id", |t| t.view.id.clone()),
    Column::narrow("group", |t| t.view.group.clone()),
    Column::narrow("uses", |t| t.view.uses.to_string()),
    Column::time("expires_at", |t| t.view.expires_at.clone()),
    Column::narrow("token", |t| t.token.clone()),
];

pub(crate) async fn run(command: Token, client: &Client, desk: &Desk, out: &Output) -> Result<Exit, Failure> {
    match command {
        Token::Create { uses, expires, group, without_trust } => {
            // Before a token is made that nobody would use.
            let root = desk.root_digest()?;
            if root.is_none() && !without_trust {
                return Err(DeskError::NoTrust(desk.folder().to_path_buf()).into());
            }
            let body = CreateToken { uses, expires_in_s: expires.as_secs(), group };
            let mut made: NewToken = client.post(&["tokens"], &body).await?;
            // Here, so that the manager cannot choose whose patterns agents load.
            let mut token: EnrollmentToken = made.token.parse().map_err(|_| Failure::StrangeToken)?;
            token.root = root;
            made.token = token.to_string();
            let view = &made.view;
            say(&tm_protocol::text::escape_for_display(&format!(
                "token {} lets {} agent(s) into group `{}` until {}; it is a secret and shown only now",
                view.id, view.uses, view.group, view.expires_at
            )));
            say("\nuse it on an endpoint: tm-agent enroll --data /var/lib/tm-agent --token-file FILE\n");
            match out.format() {
                Format::Table => out.line(&made.token)?,
                Format::Json | Format::Csv => out.one(&made, &NEW)?,
            }
        }
        Token::List => {
            let tokens: Vec<TokenView> = client.get(&["tokens"], &()).await?;
            out.list(&tokens, &COLUMNS, "no enrollment tokens")?;
        }
        Token::Revoke { id } => {
            client.delete(&["tokens", &id]).await?;
            say("the token lets nobody in any more; agents that it let in stay\n");
        }
    }
    Ok(Exit::Done)
}
