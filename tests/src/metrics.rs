//! Reading metrics in Prometheus' text format.

use std::collections::BTreeMap;

/// One line of metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

impl Sample {
    /// The value of a label; empty where the sample doesn't have it.
    pub fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

/// All metrics of one scrape.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Vec<Sample>);

impl Metrics {
    /// Reads what `/metrics` said. Lines that aren't samples are passed over.
    pub fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse_sample).collect())
    }

    pub fn iter(&self) -> impl Iterator<Item = &Sample> {
        self.0.iter()
    }

    /// The samples of one family that have all of `labels`.
    pub fn samples<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.0.iter().filter(move |sample| {
            let mut wanted = labels.iter();
            sample.name == name && wanted.all(|(label, value)| sample.label(label) == *value)
        })
    }

    /// The sum of the samples of one family that have all of `labels`.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples(name, labels).map(|sample| sample.value).sum()
    }

    /// How many new connections the kernel's programs decided about in this way.
    pub fn syns(&self, direction: &str, verdict: &str, reason: &str) -> f64 {
        self.steering("syns", direction, verdict, reason)
    }

    /// How many single packets the kernel's programs decided about in this way.
    pub fn steering_packets(&self, direction: &str, verdict: &str, reason: &str) -> f64 {
        self.steering("packets", direction, verdict, reason)
    }

    fn steering(&self, unit: &str, direction: &str, verdict: &str, reason: &str) -> f64 {
        let name = format!("malla_steering_{unit}_total");
        let labels = [
            ("direction", direction),
            ("verdict", verdict),
            ("reason", reason),
        ];
        self.sum(&name, &labels)
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let line = line.trim();
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    if name.is_empty() || name.starts_with('#') {
        return None;
    }
    let mut labels = BTreeMap::new();
    let mut rest = rest;
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside.trim_start_matches(',');
        while !rest.starts_with('}') {
            let (label, after) = rest.split_once("=\"")?;
            let (value, after) = parse_quoted(after)?;
            labels.insert(label.trim().to_owned(), value);
            rest = after.trim_start_matches(',');
        }
        rest = &rest[1..];
    }
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    Some(Sample {
        name: name.to_owned(),
        labels,
        value,
    })
}

/// The text up to the closing quote with its escapes undone, and what comes after.
fn parse_quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((place, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[place + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                other => value.push(other),
            },
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let metrics = Metrics::parse(
            "# HELP tcp_open_total Connections.\n\
             tcp_open_total{direction=\"inbound\",client_id=\"a \\\"b\\\", c\"} 3\n\
             tcp_open_total{direction=\"outbound\"} 4\n\
             uptime_seconds 1.5\n",
        );
        assert!((metrics.sum("tcp_open_total", &[]) - 7.0).abs() < f64::EPSILON);
        let inbound = [("direction", "inbound"), ("client_id", "a \"b\", c")];
        assert!((metrics.sum("tcp_open_total", &inbound) - 3.0).abs() < f64::EPSILON);
        assert_eq!(metrics.iter().count(), 3);
    }
}
