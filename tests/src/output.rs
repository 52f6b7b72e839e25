//! What a command printed, and how it ended.

use std::process::ExitStatus;

use serde_json::Value;

/// What a command printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// For pipes and eyes.
    pub stdout: Vec<u8>,
    /// Talk.
    pub stderr: Vec<u8>,
}

impl From<std::process::Output> for Output {
    fn from(output: std::process::Output) -> Self {
        Self { status: output.status, stdout: output.stdout, stderr: output.stderr }
    }
}

impl Output {
    /// Its exit code; -1 if a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Itself, if it exited with `code`.
    ///
    /// # Panics
    /// With everything it printed, if it did not.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "exit code\n{}", self.both());
        self
    }

    /// Both streams, for messages.
    pub fn both(&self) -> String {
        format!("--- stdout\n{}\n--- stderr\n{}", self.out(), self.err())
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The JSON on standard output: one value, or several one after the other as an array.
    ///
    /// # Panics
    /// If it is not JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        let values: Result<Vec<Value>, _> =
            serde_json::Deserializer::from_slice(&self.stdout).into_iter().collect();
        match values {
            Ok(mut values) if values.len() == 1 => values.remove(0),
            Ok(values) => Value::Array(values),
            Err(error) => panic!("not JSON ({error})\n{}", self.both()),
        }
    }
}

/// The rows of a list, whether it is printed as an array or as a page.
pub fn rows(value: &Value) -> Vec<Value> {
    let list = value.as_array().or_else(|| value.get("items")?.as_array());
    list.cloned().unwrap_or_else(|| vec![value.clone()])
}

/// Every object, however deep, that has all of `keys`.
pub fn objects(value: &Value, keys: &[&str]) -> Vec<Value> {
    let mut found = Vec::new();
    let mut open = vec![value];
    while let Some(value) = open.pop() {
        if let Value::Object(map) = value {
            if keys.iter().all(|key| map.contains_key(*key)) {
                found.push(value.clone());
            }
            open.extend(map.values());
        } else if let Value::Array(rows) = value {
            open.extend(rows.iter().rev());
        }
    }
    found
}
