//! Discovery from one YAML file, watched.
//!
//! The way of a file: [`watch()`] notices a change and reads the text, `parse` gives it a shape,
//! [`check()`] gives it a meaning; `reader` does both for what is new in a text. A file is taken whole or refused whole.

mod check;
mod error;
mod links;
mod parse;
mod reader;
mod schema;
mod watch;

pub use check::check;
pub use parse::node_folders;
pub use schema::json_schema;
pub use watch::watch;
