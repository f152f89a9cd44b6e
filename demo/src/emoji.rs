//! The service that knows the emojis.

use anyhow::{Context, Result, bail};

use crate::protocol;

/// Emojis with the short names that they go by.
const EMOJIS: &[(&str, &str)] = &[
    ("👻", ":ghost:"),
    ("🍕", ":pizza:"),
    ("😂", ":joy:"),
    ("🍩", ":doughnut:"),
    ("🚀", ":rocket:"),
    ("🐙", ":octopus:"),
    ("🌮", ":taco:"),
    ("🎸", ":guitar:"),
    ("🦄", ":unicorn:"),
    ("🏖", ":beach_umbrella:"),
    ("🧀", ":cheese_wedge:"),
    ("🐝", ":honeybee:"),
    ("🌈", ":rainbow:"),
    ("🎈", ":balloon:"),
    ("🥑", ":avocado:"),
    ("🦉", ":owl:"),
    ("⛵", ":sailboat:"),
    ("🍄", ":mushroom:"),
    ("🐧", ":penguin:"),
    ("🥁", ":drum_with_drumsticks:"),
];

pub(crate) fn serve(port: u16) -> Result<()> {
    protocol::serve(port, answer)
}

fn answer(request: &str) -> Result<String> {
    match request.split_once(' ') {
        None if request == "LIST" => {
            let entries = EMOJIS.iter().map(|(sign, name)| format!("{sign} {name}"));
            Ok(entries.collect::<Vec<_>>().join(" "))
        }
        Some(("FIND", wanted)) => {
            let found = EMOJIS.iter().find(|(_, name)| *name == wanted);
            let (sign, _) = found.with_context(|| format!("no emoji is called {wanted}"))?;
            Ok((*sign).to_owned())
        }
        _ => bail!("the emoji service knows LIST and FIND :name:"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_emoji_is_found_by_its_name() {
        let list = answer("LIST").unwrap();
        let words: Vec<&str> = list.split(' ').collect();
        assert_eq!(words.len(), 2 * EMOJIS.len());
        for pair in words.chunks(2) {
            assert_eq!(answer(&format!("FIND {}", pair[1])).unwrap(), pair[0]);
        }
        assert!(answer("FIND :nothing:").is_err());
    }
}
