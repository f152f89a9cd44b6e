//! One event as one line, in either form.

use std::fmt::{self, Debug, Write as _};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

use super::LogFormat;

/// The target that the bridge from the `log` crate gives its events. The true one is a field.
const BRIDGE: &str = "log";

/// Formats events; see [`LogFormat`] for the forms.
pub(super) struct Line(pub LogFormat);

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = level(*event.metadata().level());
        let mut target = Target(None);
        if event.metadata().target() == BRIDGE {
            event.record(&mut target);
        }
        let target = target.0.as_deref().unwrap_or(event.metadata().target());
        match self.0 {
            LogFormat::Text => {
                SystemTime.format_time(&mut writer)?;
                write!(writer, "\t{level}\t{target}")?;
            }
            LogFormat::Json => {
                write!(writer, "{{\"level\":\"{level}\",\"time\":\"")?;
                SystemTime.format_time(&mut writer)?;
                write!(writer, "\",\"scope\":{}", json(target))?;
            }
        }
        let mut fields = Fields {
            format: self.0,
            pairs: 0,
            result: Ok(()),
            writer: &mut writer,
        };
        event.record(&mut fields);
        fields.result?;
        writer.write_str(match self.0 {
            LogFormat::Text => "\n",
            LogFormat::Json => "}\n",
        })
    }
}

fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn json(text: &str) -> serde_json::Value {
    serde_json::Value::from(text)
}

/// Finds the target that an event of the `log` crate had.
struct Target(Option<String>);

impl Visit for Target {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "log.target" {
            self.0 = Some(value.to_owned());
        }
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn Debug) {}
}

/// Writes an event's fields in the order in which the event has them: the message is the first.
struct Fields<'a, 'w> {
    format: LogFormat,
    /// Pairs written so far.
    pairs: usize,
    result: fmt::Result,
    writer: &'a mut Writer<'w>,
}

impl Fields<'_, '_> {
    /// `text` is for the plain form, `value` for JSON.
    fn pair(
        &mut self,
        field: &Field,
        text: fmt::Arguments<'_>,
        value: impl FnOnce() -> serde_json::Value,
    ) {
        // Where the bridge from the `log` crate found an event is no field of that event.
        if self.result.is_err() || field.name().starts_with("log.") {
            return;
        }
        self.result = match self.format {
            LogFormat::Json => write!(self.writer, ",{}:{}", json(field.name()), value()),
            LogFormat::Text => self
                .name(field)
                .and_then(|()| OneLine(self.writer).write_fmt(text)),
        };
    }

    /// What stands before a field's value in the plain form.
    fn name(&mut self, field: &Field) -> fmt::Result {
        if field.name() == "message" {
            return self.writer.write_char('\t');
        }
        self.writer
            .write_char(if self.pairs == 0 { '\t' } else { ' ' })?;
        self.pairs += 1;
        self.writer.write_str(field.name())?;
        self.writer.write_char('=')
    }

    /// A text that stands between quotes as it is, as nearly all do.
    fn quoted(&mut self, field: &Field, text: &str) {
        if self.result.is_ok() {
            self.result = self.name(field).and_then(|()| {
                self.writer.write_char('"')?;
                self.writer.write_str(text)?;
                self.writer.write_char('"')
            });
        }
    }
}

impl Visit for Fields<'_, '_> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.pair(field, format_args!("{value}"), || value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.pair(field, format_args!("{value}"), || value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.pair(field, format_args!("{value}"), || value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.pair(field, format_args!("{value}"), || value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.pair(field, format_args!("{value}"), || value.into());
        } else if self.format == LogFormat::Text
            && is_plain(value)
            && !value.contains(['"', '\\'])
            && !field.name().starts_with("log.")
        {
            self.quoted(field, value);
        } else {
            self.pair(field, format_args!("{value:?}"), || value.into());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.pair(field, format_args!("{value:?}"), || {
            format!("{value:?}").into()
        });
    }
}

/// Whether all of it can be printed, and is ASCII.
fn is_plain(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

/// Escapes control characters, so that no value can begin a line or a column of its own.
struct OneLine<'a, 'w>(&'a mut Writer<'w>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if is_plain(text) {
            return self.0.write_str(text);
        }
        for part in text.split_inclusive(char::is_control) {
            let last = part.chars().next_back().filter(|last| last.is_control());
            match last {
                Some(control) => {
                    self.0.write_str(&part[..part.len() - control.len_utf8()])?;
                    write!(self.0, "{}", control.escape_default())?;
                }
                None => self.0.write_str(part)?,
            }
        }
        Ok(())
    }
}
