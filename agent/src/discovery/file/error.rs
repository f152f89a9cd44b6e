//! What can be wrong with a mesh file, told so that the user can mend it.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

/// More problems than this aren't printed, only counted: one mistake in a generated file can
/// repeat a thousand times.
const PRINTED_PROBLEMS: usize = 50;

/// Why a mesh file is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: is not a regular file", path.display())]
    NotAFile { path: PathBuf },
    #[error("{}: is larger than {limit} bytes, the most that a mesh file may have", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("{}", Report { path, problems })]
    Invalid {
        path: PathBuf,
        /// In the order of the file, never empty.
        problems: Vec<Problem>,
    },
    #[error("{}: cannot be watched: {source}", path.display())]
    Watch { path: PathBuf, source: io::Error },
}

impl Error {
    /// Of a file whose text is UTF-8 only as far as `good`.
    pub(super) fn not_utf8(path: &Path, good: &[u8]) -> Self {
        let line = good.split(|byte| *byte == b'\n').count();
        Self::Invalid {
            path: path.to_owned(),
            problems: vec![Problem {
                line: Some(line as u64),
                field: String::new(),
                reason: "is not UTF-8 from here on".to_owned(),
            }],
        }
    }

    /// One word for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::NotAFile { .. } => "not_a_file",
            Self::TooLarge { .. } => "too_large",
            Self::Invalid { .. } => "invalid",
            Self::Watch { .. } => "watch",
        }
    }
}

/// One mistake in a mesh file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1. `None` where the whole file is meant.
    pub line: Option<u64>,
    /// Path of the field, such as `workloads[1].addresses[0]`. Empty where the whole file is meant.
    pub field: String,
    /// What is wrong, and the fix where one can be told.
    pub reason: String,
}

/// Prints problems one a line, each after the file's path as compilers do.
struct Report<'a> {
    path: &'a PathBuf,
    problems: &'a [Problem],
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        for (index, problem) in self.problems.iter().take(PRINTED_PROBLEMS).enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{path}:")?;
            if let Some(line) = problem.line {
                write!(f, "{line}:")?;
            }
            if !problem.field.is_empty() {
                write!(f, " {}:", problem.field)?;
            }
            write!(f, " {}", problem.reason)?;
        }
        if let Some(rest @ 1..) = self.problems.len().checked_sub(PRINTED_PROBLEMS) {
            write!(f, "\n{path}: and {rest} more")?;
        }
        Ok(())
    }
}
