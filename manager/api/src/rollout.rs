//! Versions of patterns that reach a fleet in waves.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A part of the whole, from 0.01 % to 100 %; as text `1%`, `0.5%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share(u16);

/// A text that is no share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a share (more than 0% to 100%, with two decimals at most, is expected, as in `1%` or `0.5%`)")]
pub struct InvalidShare;

impl Share {
    /// Everything.
    pub const ALL: Self = Self(Self::PARTS);
    /// How many parts the whole has.
    pub const PARTS: u16 = 10_000;
    /// The share at which a brake acts unless something else is said.
    pub const BRAKE: Self = Self(200);

    /// So many hundredths of a percent; `None` if that is nothing or more than everything.
    pub const fn new(hundredths: u16) -> Option<Self> {
        if hundredths >= 1 && hundredths <= Self::PARTS { Some(Self(hundredths)) } else { None }
    }

    /// In hundredths of a percent, 1 to 10,000.
    pub const fn hundredths(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0 / 100, self.0 % 100) {
            (whole, 0) => write!(f, "{whole}%"),
            (whole, part) if part % 10 == 0 => write!(f, "{whole}.{}%", part / 10),
            (whole, part) => write!(f, "{whole}.{part:02}%"),
        }
    }
}

impl FromStr for Share {
    type Err = InvalidShare;

    fn from_str(text: &str) -> Result<Self, InvalidShare> {
        let number = text.strip_suffix('%').ok_or(InvalidShare)?;
        let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
        // `parse` alone would take a sign.
        let digits = |text: &str, most| {
            (1..=most).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        if !digits(whole, 3) || !digits(part, 2) {
            return Err(InvalidShare);
        }
        let count = |text: &str| text.parse::<u16>().map_err(|_| InvalidShare);
        let tenfold = if part.len() == 1 { 10 } else { 1 };
        let sum = count(whole)?.checked_mul(100).and_then(|sum| sum.checked_add(count(part).ok()? * tenfold));
        sum.and_then(Self::new).ok_or(InvalidShare)
    }
}

impl TryFrom<String> for Share {
    type Error = InvalidShare;

    fn try_from(text: String) -> Result<Self, InvalidShare> {
        text.parse()
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        share.to_string()
    }
}

/// How far a version has come, and goes on: shares that grow, the last of them everything. At most [`Waves::MOST`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Share>", into = "Vec<Share>")]
pub struct Waves(Vec<Share>);

/// What no waves are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWaves {
    /// One of them is no share.
    #[error(transparent)]
    Share(#[from] InvalidShare),
    /// They do not grow.
    #[error("each wave is larger than the one before it")]
    Order,
    /// They end early.
    #[error("the last wave is 100%")]
    End,
    /// There are too many.
    #[error("there are at most {} waves", Waves::MOST)]
    Many,
}

impl Waves {
    /// Most of them.
    pub const MOST: usize = 20;

    /// Everybody at once.
    pub fn all() -> Self {
        Self(vec![Share::ALL])
    }

    /// Each, in order; there is one at least.
    pub fn shares(&self) -> &[Share] {
        &self.0
    }
}

impl TryFrom<Vec<Share>> for Waves {
    type Error = InvalidWaves;

    fn try_from(shares: Vec<Share>) -> Result<Self, InvalidWaves> {
        if shares.len() > Self::MOST {
            Err(InvalidWaves::Many)
        } else if !shares.is_sorted_by(|a, b| a < b) {
            Err(InvalidWaves::Order)
        } else if shares.last() != Some(&Share::ALL) {
            Err(InvalidWaves::End)
        } else {
            Ok(Self(shares))
        }
    }
}

impl From<Waves> for Vec<Share> {
    fn from(waves: Waves) -> Self {
        waves.0
    }
}

impl FromStr for Waves {
    type Err = InvalidWaves;

    fn from_str(text: &str) -> Result<Self, InvalidWaves> {
        let shares: Result<Vec<Share>, InvalidShare> = text.split(',').map(str::parse).collect();
        Self::try_from(shares?)
    }
}

impl fmt::Display for Waves {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shares: Vec<String> = self.0.iter().map(Share::to_string).collect();
        f.write_str(&shares.join(","))
    }
}

/// How far a rollout is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RolloutState {
    /// It has come to one of its waves; its brake watches.
    Running,
    /// It has come to the last one, and nothing watches any more.
    Complete,
    /// By its brake or a person: nobody gets the version.
    Stopped,
    /// The fleet no longer lists the version.
    Withdrawn,
}

impl RolloutState {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Running, Self::Complete, Self::Stopped, Self::Withdrawn];

    /// The word for it in every output and in the store.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Complete => "complete",
            Self::Stopped => "stopped",
            Self::Withdrawn => "withdrawn",
        }
    }

    /// Reads [`RolloutState::word`] back.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }
}

impl fmt::Display for RolloutState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a version is to reach the fleet; a part of [`crate::trust::PublishTrust`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartRollout {
    /// Only this group's endpoints; every endpoint's where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// In which waves.
    pub waves: Waves,
    /// Stop it when more than this share of the endpoints that have looked with it found something, and three of
    /// them at least.
    pub brake_share: Share,
    /// Begin the next wave by itself after so many seconds, 10 to a year; else a person says when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every_s: Option<u64>,
}

/// `POST /v1/rollouts/{rollout}/resume`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResumeRollout {
    /// Also one that its brake stopped; that brake is then off.
    #[serde(default)]
    pub force: bool,
}

/// `POST /v1/rollouts/{rollout}/stop`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopRollout {
    /// Why, for the record.
    #[serde(default)]
    pub reason: String,
}

/// A rollout: a row of `GET /v1/rollouts` (newest first), or the answer to `GET /v1/rollouts/{rollout}` (id, or the
/// pattern's name for its newest one) and to what moves it: `POST` on `…/advance`, `…/stop` and `…/resume`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RolloutView {
    /// Its id.
    pub id: String,
    /// The pattern's name.
    pub name: String,
    /// SHA-256 of the version that is rolled out.
    pub sha256: String,
    /// Of the one that the name meant before.
    pub previous: Option<String>,
    /// The group that it is for; absent if it is for all.
    pub group: Option<String>,
    /// How far it is.
    pub state: RolloutState,
    /// All its waves.
    pub waves: Waves,
    /// Which of them it has come to, from 1.
    pub wave: u32,
    /// The share of its endpoints that has the version; absent if nobody has.
    pub reach: Option<Share>,
    /// How many of the known endpoints that are.
    pub endpoints: u64,
    /// Endpoints that have looked with the version since it began.
    pub looked: u64,
    /// Of these, those on which it found something.
    pub hits: u64,
    /// The share of `looked` above which `hits` stop it.
    pub brake_share: Share,
    /// Whether anything would stop it still.
    pub brake: bool,
    /// How long a wave takes, in seconds; absent if a person says when the next begins.
    pub every_s: Option<u64>,
    /// When the next one begins by itself.
    pub next_at: Option<String>,
    /// Why it was stopped: `brake-package`, `brake-share` or `by-hand`.
    pub code: Option<String>,
    /// The same in a sentence.
    pub reason: Option<String>,
    /// Who published the version so.
    pub started_by: String,
    /// When.
    pub started_at: String,
    /// When it last began a wave, stopped or went on.
    pub changed_at: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_have_one_strict_form() {
        for (text, hundredths) in
            [("1%", 100), ("0.5%", 50), ("0.01%", 1), ("12.25%", 1225), ("100%", 10_000), ("99.99%", 9999)]
        {
            let share: Share = text.parse().unwrap();
            assert_eq!((share.hundredths(), share.to_string().as_str()), (hundredths, text));
        }
        for text in [
            "", "%", "1", "0%", "0.00%", "101%", "100.01%", "-1%", "+1%", "1.%", ".5%", "1.234%", "abc",
            "1 %", "1%%", "999%", "65536%", "١%",
        ] {
            assert_eq!(text.parse::<Share>(), Err(InvalidShare), "{text}");
        }
    }

    #[test]
    fn waves_grow_to_all() {
        for text in ["1%,10%,100%", "100%", "0.5%,100%"] {
            let waves: Waves = text.parse().unwrap();
            assert_eq!(waves.to_string(), text);
            let json = serde_json::to_string(&waves).unwrap();
            assert_eq!(serde_json::from_str::<Waves>(&json).unwrap(), waves);
        }
        for (text, why) in [
            ("0%", InvalidWaves::Share(InvalidShare)),
            ("abc", InvalidWaves::Share(InvalidShare)),
            ("", InvalidWaves::Share(InvalidShare)),
            ("1%,,100%", InvalidWaves::Share(InvalidShare)),
            ("101%", InvalidWaves::Share(InvalidShare)),
            ("100%,1%", InvalidWaves::Order),
            ("1%,1%,100%", InvalidWaves::Order),
            ("1%,10%", InvalidWaves::End),
        ] {
            assert_eq!(text.parse::<Waves>(), Err(why), "{text}");
        }
        assert!(serde_json::from_str::<Waves>("[]").is_err());
        let many: Vec<String> = (1..=20).map(|n| format!("{n}%")).collect();
        assert_eq!(format!("{},100%", many.join(",")).parse::<Waves>(), Err(InvalidWaves::Many));
    }

    #[test]
    fn states_are_read_back() {
        for state in RolloutState::ALL {
            assert_eq!(RolloutState::from_word(state.word()), Some(state));
        }
        assert_eq!(RolloutState::from_word("x"), None);
    }
}
