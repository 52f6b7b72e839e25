//! `tmctl account`.

use tm_api::account::{AccountView, CreateAccount, NewAccountToken};

use crate::{
    cli::Account,
    client::Client,
    failure::{Exit, Failure},
    output::{Column, Format, Output, say},
};

const COLUMNS: [Column<AccountView>; 4] = [
    Column::narrow("name", |a| a.name.clone()),
    Column::narrow("role", |a| a.role.to_string()),
    Column::time("created_at", |a| a.created_at.clone()),
    Column::time("last_used_at", |a| a.last_used_at.clone().unwrap_or_default()),
];

const NEW: [Column<NewAccountToken>; 3] = [
    Column::narrow("name", |a| a.account.name.clone()),
    Column::narrow("role", |a| a.account.role.to_string()),
    Column::narrow("token", |a| a.token.clone()),
];

pub(crate) async fn run(command: Account, client: &Client, out: &Output) -> Result<Exit, Failure> {
    match command {
        Account::Create { name, role } => {
            let made: NewAccountToken = client.post(&["accounts"], &CreateAccount { name, role }).await?;
            show(&made, out)?;
        }
        Account::List => {
            let accounts: Vec<AccountView> = client.get(&["accounts"], &()).await?;
            out.list(&accounts, &COLUMNS, "no accounts")?;
        }
        Account::Delete { name } => {
            client.delete(&["accounts", &name]).await?;
            say("the account is gone, and its token with it\n");
        }
        Account::Token { name } => {
            let made: NewAccountToken = client.post(&["accounts", &name, "token"], &()).await?;
            show(&made, out)?;
        }
    }
    Ok(Exit::Done)
}

fn show(made: &NewAccountToken, out: &Output) -> Result<(), Failure> {
    say("this token is a secret and shown only now; it goes into the person's profile as `token`\n");
    match out.format() {
        Format::Table => out.line(&made.token),
        Format::Json | Format::Csv => out.one(made, &NEW),
    }
}
