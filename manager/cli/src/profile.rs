//! The profile: where the manager is, which authority vouches for it, and who is asking.

use std::{
    env, fmt, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use reqwest::Url;
use serde::Deserialize;
use tm_protocol::ids::Sha256;

/// A profile that was read.
#[derive(Debug)]
pub(crate) struct Profile {
    /// Where it was read from, for messages.
    pub(crate) path: PathBuf,
    /// The administrators' port.
    pub(crate) url: Url,
    /// The authority that the manager's certificate must come from.
    pub(crate) ca_sha256: Sha256,
    /// Who is asking.
    pub(crate) token: Token,
}

/// An account's bearer token; never shown.
#[derive(Clone)]
pub(crate) struct Token(String);

impl Token {
    /// For the request's header only.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    /// Neither option, nor variable, nor a home folder.
    #[error("no profile was named, and there is no home folder to look in")]
    Nowhere,
    /// It cannot be read.
    #[error("cannot read the profile `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what a profile is.
    #[error("the profile `{}` is not right", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        source: toml::de::Error,
    },
    /// Its address is of no use.
    #[error("`url` in the profile `{}` is not an `https://` address of a host", path.display())]
    Url {
        /// Which.
        path: PathBuf,
    },
    /// Its token cannot be sent.
    #[error("`token` in the profile `{}` is empty or holds characters that no token has", path.display())]
    Token {
        /// Which.
        path: PathBuf,
    },
}

impl Profile {
    /// Reads the profile at `path`, or the one in the home folder.
    ///
    /// # Errors
    /// If there is none, or it is not right.
    pub(crate) fn load(path: Option<&Path>) -> Result<Self, ProfileError> {
        let path = match path {
            Some(path) => path.to_path_buf(),
            None => default_path(env::var_os("HOME").map(PathBuf::from)).ok_or(ProfileError::Nowhere)?,
        };
        let text =
            fs::read_to_string(&path).map_err(|source| ProfileError::Read { path: path.clone(), source })?;
        if fs::metadata(&path).is_ok_and(|meta| meta.mode() & 0o077 != 0) {
            crate::output::say(&format!(
                "warning: others can read the secret in `{0}`; run: chmod 600 {0}\n",
                path.display()
            ));
        }
        Self::parse(path, &text)
    }

    fn parse(path: PathBuf, text: &str) -> Result<Self, ProfileError> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Raw {
            url: String,
            ca_sha256: Sha256,
            token: String,
        }
        let raw: Raw = match toml::from_str(text) {
            Ok(raw) => raw,
            Err(mut source) => {
                // The text would be quoted in the message, and a token stands in it.
                source.set_input(None);
                return Err(ProfileError::Parse { path, source });
            }
        };
        let plain = |url: &Url| {
            url.scheme() == "https"
                && url.has_host()
                && matches!(url.path(), "" | "/")
                && url.query().is_none()
        };
        let Some(url) = Url::parse(&raw.url).ok().filter(plain) else {
            return Err(ProfileError::Url { path });
        };
        if raw.token.is_empty() || !raw.token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ProfileError::Token { path });
        }
        Ok(Self { path, url, ca_sha256: raw.ca_sha256, token: Token(raw.token) })
    }
}

impl Profile {
    /// Where the keys of this fleet lie unless something else is said; `None` without a home folder.
    pub(crate) fn trust_folder(&self) -> Option<PathBuf> {
        let home = PathBuf::from(env::var_os("HOME")?);
        let digest = self.ca_sha256.to_string();
        let folder = digest.get(..16).unwrap_or(&digest);
        home.is_absolute().then(|| home.join(".config/tmctl/trust").join(folder))
    }
}

fn default_path(home: Option<PathBuf>) -> Option<PathBuf> {
    home.filter(|home| home.is_absolute()).map(|home| home.join(".config/tmctl/profile.toml"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Profile, ProfileError> {
        Profile::parse("p.toml".into(), text)
    }

    #[test]
    fn a_profile_is_exactly_three_settings() {
        let ca = "ab".repeat(32);
        let whole = |url: &str, ca: &str, token: &str| {
            format!("url = \"{url}\"\nca_sha256 = \"{ca}\"\ntoken = \"{token}\"\n")
        };
        let good = parse(&whole("https://127.0.0.1:7444", &ca, "tm_abc-1")).unwrap();
        assert_eq!(good.url.as_str(), "https://127.0.0.1:7444/");
        assert_eq!(good.ca_sha256, Sha256::new([0xab; 32]));
        assert_eq!(good.token.expose(), "tm_abc-1");
        for bad in [
            String::new(),
            whole("http://127.0.0.1:7444", &ca, "t"),
            whole("https://m/path", &ca, "t"),
            whole("not a url", &ca, "t"),
            whole("https://m", "abab", "t"),
            whole("https://m", &ca, ""),
            whole("https://m", &ca, "a b"),
            whole("https://m", &ca, "t") + "insecure = true\n",
        ] {
            assert!(parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_never_gets_into_messages() {
        let text = format!(
            "url = \"https://m\"\nca_sha256 = \"{}\"\ntoken = \"geheim\" trailing\n",
            "ab".repeat(32)
        );
        let error = parse(&text).unwrap_err();
        let shown = crate::failure::Failure::from(error).report();
        assert!(!shown.contains("geheim"), "{shown}");
        assert!(!format!("{:?}", Token("geheim".into())).contains("geheim"));
    }

    #[test]
    fn the_default_lies_in_the_home_folder() {
        let path = |home: &str| default_path(Some(home.into()));
        assert_eq!(path("/home/a"), Some("/home/a/.config/tmctl/profile.toml".into()));
        assert_eq!(path("relative"), None);
        assert_eq!(default_path(None), None);
    }
}
