//! What an agent counts, read from Prometheus' text format.

use std::collections::BTreeMap;

/// One scrape.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Metrics(Vec<Sample>);

/// One line of a scrape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    pub(super) value: f64,
}

impl Sample {
    /// The value of a label; empty where there is none, as Prometheus has it.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }

    /// The value of a counter of things, which is a whole number below 2^53.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub(super) fn count(&self) -> u64 {
        self.value as u64
    }
}

impl Metrics {
    /// Reads a scrape. Lines that aren't samples are left out: comments, and whatever a later
    /// version of the agent may say.
    pub(super) fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(sample).collect())
    }

    /// The samples of a family.
    pub(super) fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| sample.name == name)
    }

    /// The value of a family that has one sample.
    pub(super) fn value(&self, name: &str) -> Option<f64> {
        self.of(name).next().map(|sample| sample.value)
    }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = value.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// The labels up to their brace, and what is after it.
fn labels(mut text: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(rest) = text.strip_prefix('}') {
            return Some((labels, rest));
        }
        let (name, rest) = text.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = rest.char_indices();
        let end = loop {
            match characters.next()? {
                (at, '"') => break at,
                (_, '\\') => match characters.next()?.1 {
                    'n' => value.push('\n'),
                    other => value.push(other),
                },
                (_, other) => value.push(other),
            }
        };
        labels.insert(name.to_owned(), value);
        text = &rest[end + 1..];
        text = text.strip_prefix(',').unwrap_or(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_with_their_labels_and_escapes() {
        let metrics = Metrics::parse(concat!(
            "# HELP a Something.\n# TYPE a counter\n",
            "a 5\n",
            "b{x=\"1\",y=\"a \\\"b\\\\\\n}\"} 2.5e3\n",
            "b{} 7 1700000000\n",
            "bad{x=\"1\n",
        ));
        assert_eq!(metrics.value("a"), Some(5.0));
        let b: Vec<_> = metrics.of("b").collect();
        assert_eq!(b.len(), 2);
        assert_eq!(b[0].label("y"), "a \"b\\\n}");
        assert_eq!((b[0].value, b[1].count()), (2500.0, 7));
        assert_eq!(b[1].label("x"), "");
        assert_eq!(metrics.of("bad").count(), 0);
    }
}
