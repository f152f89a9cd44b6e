//! Signs and colours. Colours are for a terminal, and for nobody who says `NO_COLOR`.

use std::io::IsTerminal;

/// How signs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Style {
    coloured: bool,
}

/// What became of something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Sign {
    Good,
    Warning,
    Bad,
}

impl Sign {
    /// As Linkerd's command line has them.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Good => "√",
            Self::Warning => "‼",
            Self::Bad => "×",
        }
    }

    const fn colour(self) -> &'static str {
        match self {
            Self::Good => "\x1b[32m",
            Self::Warning => "\x1b[33m",
            Self::Bad => "\x1b[31m",
        }
    }
}

impl Style {
    #[cfg(test)]
    pub(super) const PLAIN: Self = Self { coloured: false };

    /// As the standard output takes it.
    pub(super) fn of_stdout() -> Self {
        // https://no-color.org: any value but the empty one.
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            coloured: !refused && std::io::stdout().is_terminal(),
        }
    }

    pub(super) fn sign(self, sign: Sign) -> String {
        if self.coloured {
            format!("{}{}\x1b[0m", sign.colour(), sign.as_str())
        } else {
            sign.as_str().to_owned()
        }
    }
}
