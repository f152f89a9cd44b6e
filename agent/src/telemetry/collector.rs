//! Metrics whose values are read when somebody scrapes, instead of being kept up to date.

use std::fmt;

use prometheus::{
    core::{Collector, Desc},
    proto::{Counter, Gauge, LabelPair, Metric, MetricFamily, MetricType},
};

/// Name, help and kind of one family.
#[derive(Debug, Clone, Copy)]
pub(super) struct Family {
    pub name: &'static str,
    pub help: &'static str,
    pub kind: MetricType,
    pub labels: &'static [&'static str],
}

impl Family {
    /// What the registry checks for clashes of names and labels.
    pub(super) fn describe(&self) -> Desc {
        let labels = self.labels.iter().map(|&label| label.to_owned()).collect();
        Desc::new(
            self.name.to_owned(),
            self.help.to_owned(),
            labels,
            std::collections::HashMap::new(),
        )
        // Names and labels are constants of this module's callers, and a test scrapes them all.
        .expect("family names and labels are valid")
    }

    /// The family with `metrics` in it.
    pub(super) fn with(&self, metrics: Vec<Metric>) -> MetricFamily {
        let mut family = MetricFamily::default();
        family.set_name(self.name.to_owned());
        family.set_help(self.help.to_owned());
        family.set_field_type(self.kind);
        family.set_metric(metrics);
        family
    }

    /// One sample of this family. `labels` must be sorted by name, as the registry sorts samples
    /// by the order it finds.
    #[expect(
        clippy::cast_precision_loss,
        reason = "the text format has doubles only"
    )]
    pub(super) fn sample(&self, labels: Vec<LabelPair>, value: u64) -> Metric {
        self.sample_f64(labels, value as f64)
    }

    pub(super) fn sample_f64(&self, labels: Vec<LabelPair>, value: f64) -> Metric {
        let mut metric = Metric::from_label(labels);
        if self.kind == MetricType::COUNTER {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
        metric
    }
}

/// Makes a label.
pub(super) fn label(name: &str, value: impl Into<String>) -> LabelPair {
    let mut pair = LabelPair::default();
    pair.set_name(name.to_owned());
    pair.set_value(value.into());
    pair
}

/// A collector that asks a function.
pub(super) struct Sampled<F> {
    descriptions: Vec<Desc>,
    sample: F,
}

impl<F: Fn() -> Vec<MetricFamily> + Send + Sync> Sampled<F> {
    /// `sample` returns some or all of `families`.
    pub(super) fn new(families: &[Family], sample: F) -> Self {
        Self {
            descriptions: families.iter().map(Family::describe).collect(),
            sample,
        }
    }
}

impl<F: Fn() -> Vec<MetricFamily> + Send + Sync> Collector for Sampled<F> {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut families = (self.sample)();
        families.retain(|family| !family.get_metric().is_empty());
        families
    }
}

impl<F> fmt::Debug for Sampled<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sampled")
            .field("descriptions", &self.descriptions)
            .finish_non_exhaustive()
    }
}
