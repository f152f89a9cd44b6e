//! What the guest runs, as a shell script.

use crate::{shell, workspace};

/// Commands for the guest.
#[derive(Debug)]
pub(super) struct Script {
    /// How a person would call it.
    pub(super) name: String,
    /// Whether what it prints are results of tests.
    pub(super) has_tests: bool,
    /// Shell commands that leave their verdict in `$code`.
    pub(super) body: String,
}

impl Script {
    /// One command, whose exit code is the script's.
    pub(super) fn command(words: &[String]) -> Self {
        Self {
            name: words.join(" "),
            has_tests: false,
            body: format!("{}\ncode=$?\n", shell::quote(words)),
        }
    }

    /// The whole, with what comes before and after the commands. `modules` is the folder of the
    /// kernel's modules.
    pub(super) fn text(&self, modules: &str) -> String {
        let [modules, folder] = [modules.to_owned(), workspace::root().display().to_string()]
            .map(|path| shell::quote(&[path]));
        format!(
            "MODULES={modules}\n{}cd {folder}\n{}end $code\n",
            include_str!("guest.sh"),
            self.body
        )
    }
}
