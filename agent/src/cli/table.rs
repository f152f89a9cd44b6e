//! Tables in Linkerd's layout: a head in capitals, three blanks between columns, no lines.

/// What is between columns.
const GAP: usize = 3;
/// What stands for nothing.
pub(super) const ABSENT: &str = "-";

/// On which side of its column a cell stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    /// For numbers.
    Right,
}

/// A table to be printed.
#[derive(Debug)]
pub(super) struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(columns: impl IntoIterator<Item = (&'static str, Align)>) -> Self {
        Self {
            columns: columns.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row. An empty cell is printed as [`ABSENT`].
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let cells: Vec<String> = cells.into_iter().collect();
        debug_assert_eq!(cells.len(), self.columns.len(), "a cell for each column");
        self.rows.push(cells);
    }

    /// The lines of the table. Without rows there is the head alone.
    pub(super) fn render(&self) -> String {
        let shown = |cell: &str| if cell.is_empty() { ABSENT } else { cell }.to_owned();
        let head = self.columns.iter().map(|(title, _)| (*title).to_owned());
        let rows = self.rows.iter();
        let rows = rows.map(|row| row.iter().map(|cell| shown(cell)).collect());
        let lines: Vec<Vec<String>> = std::iter::once(head.collect()).chain(rows).collect();
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                let cells = lines.iter().map(|line| line[column].chars().count());
                cells.max().unwrap_or_default()
            })
            .collect();
        let mut text = String::new();
        for line in &lines {
            let mut out = String::new();
            for ((cell, width), (_, align)) in line.iter().zip(&widths).zip(&self.columns) {
                if !out.is_empty() {
                    out.push_str(&" ".repeat(GAP));
                }
                match align {
                    Align::Left => out.push_str(&format!("{cell:<width$}")),
                    Align::Right => out.push_str(&format!("{cell:>width$}")),
                }
            }
            text.push_str(out.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_nothing_is_a_dash() {
        let mut table = Table::new([("NAME", Align::Left), ("TCP_CONN", Align::Right)]);
        table.row(["a-long-name".to_owned(), "5".to_owned()]);
        table.row(["√".to_owned(), String::new()]);
        assert_eq!(
            table.render(),
            "NAME          TCP_CONN\n\
             a-long-name          5\n\
             √                    -\n"
        );
    }
}
