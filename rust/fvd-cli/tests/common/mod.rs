// SPDX-License-Identifier: MIT OR Apache-2.0
//! Running the tool, for every test of it.

use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A folder of its own for one test.
pub struct Dir(pub tempfile::TempDir);

/// What a run of the tool left: status, standard output, standard error.
pub struct Ran {
    pub status: i32,
    pub out: String,
    pub err: String,
}

impl Dir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn fvd(&self, args: &[&str]) -> Ran {
        let out = Command::new(env!("CARGO_BIN_EXE_fvd")).args(args).current_dir(self.0.path()).stdin(Stdio::null()).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let ran = Ran { status: out.status.code().expect("no signal"), out: text(out.stdout), err: text(out.stderr) };
        assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
        ran
    }

    pub fn good(&self, args: &[&str]) -> String {
        let ran = self.fvd(args);
        assert_eq!(ran.status, 0, "{args:?}: {}{}", ran.out, ran.err);
        ran.out
    }

    /// Fails with status 1 and says each of `words`.
    pub fn bad(&self, args: &[&str], words: &[&str]) {
        let ran = self.fvd(args);
        assert_eq!(ran.status, 1, "{args:?}: {}", ran.out);
        for word in words {
            assert!(ran.err.contains(word), "{args:?} should say '{word}': {}", ran.err);
        }
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.good(args)).unwrap()
    }
}
