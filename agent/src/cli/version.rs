//! `malla version`

use std::process::ExitCode;

use super::{Output, client::Location, print, print_json};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    agent: Location,
    /// Print the version of this program alone, and ask no agent.
    #[arg(long)]
    client: bool,
    /// Print the numbers alone, a line each.
    #[arg(long)]
    short: bool,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let client = env!("CARGO_PKG_VERSION");
    if arguments.client {
        return tell(arguments, client, None);
    }
    let server = arguments
        .agent
        .client()
        .and_then(|agent| agent.config())
        .map(|config| config.version);
    let told = server.as_deref().unwrap_or("unavailable");
    tell(arguments, client, Some(told))?;
    server.map(|_| ExitCode::SUCCESS)
}

fn tell(arguments: &Arguments, client: &str, server: Option<&str>) -> anyhow::Result<ExitCode> {
    if arguments.output == Output::Json {
        return print_json(&serde_json::json!({"client": client, "server": server}));
    }
    print(&lines(client, server, arguments.short))
}

fn lines(client: &str, server: Option<&str>, short: bool) -> String {
    let label = |label: &str| {
        if short {
            String::new()
        } else {
            format!("{label} version: ")
        }
    };
    let mut text = format!("{}{client}\n", label("Client"));
    if let Some(server) = server {
        text.push_str(&format!("{}{server}\n", label("Server")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_told_as_linkerd_does() {
        assert_eq!(
            lines("1.2.3", Some("unavailable"), false),
            "Client version: 1.2.3\nServer version: unavailable\n"
        );
        assert_eq!(lines("1.2.3", Some("1.2.4"), true), "1.2.3\n1.2.4\n");
        assert_eq!(lines("1.2.3", None, false), "Client version: 1.2.3\n");
    }
}
