// SPDX-License-Identifier: MIT OR Apache-2.0
//! One line on standard error for what takes more than a second.

use crate::size::human;
use fvd_host::disk::Progress;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Shorter calls say nothing.
const QUIET: Duration = Duration::from_secs(1);

/// Prints how far a call is.
pub struct Printer<W: Write> {
    what: String,
    out: Option<W>,
    /// Lines instead of one that is overwritten: the output is no terminal, but asked for.
    lines: bool,
    shown: bool,
    begin: Instant,
    last: Duration,
}

impl Printer<std::io::Stderr> {
    /// For standard error: where it is a terminal, or where `always` is set.
    pub fn stderr(what: String, always: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self::new(what, (terminal || always).then(std::io::stderr), !terminal)
    }
}

impl<W: Write> Printer<W> {
    fn new(what: String, out: Option<W>, lines: bool) -> Self {
        Self { what, out, lines, shown: false, begin: Instant::now(), last: Duration::ZERO }
    }

    /// To be called every now and then. Nothing about progress is worth an error.
    pub fn tick(&mut self, progress: Progress) {
        let mut text = String::new();
        if progress.base_reached > 0 {
            text += &format!(", base read to {}", human(progress.base_reached));
        }
        if progress.image_reached > 0 {
            text += &format!(", image at {}", human(progress.image_reached));
        }
        self.print(progress.elapsed, &text);
    }

    /// As [`Printer::tick`] where it is known how much there is to do: `done` bytes of `size`.
    pub fn tick_of(&mut self, elapsed: Duration, done: u64, size: u64) {
        let percent = if size == 0 { 100.0 } else { done as f64 * 100.0 / size as f64 };
        self.print(elapsed, &format!(", {percent:.1}%, {} of {}", human(done), human(size)));
    }

    fn print(&mut self, elapsed: Duration, how_far: &str) {
        let Some(out) = &mut self.out else { return };
        // Line by line only as often as one can read.
        let pause = if self.lines { QUIET } else { Duration::ZERO };
        if elapsed < QUIET || elapsed < self.last + pause {
            return;
        }
        self.last = elapsed;
        self.shown = true;
        let text = format!("{}: {} s{how_far}", self.what, elapsed.as_secs());
        let _ = if self.lines { writeln!(out, "{text}") } else { write!(out, "\r{text}\x1b[K").and_then(|()| out.flush()) };
    }

    /// The call is over.
    pub fn finish(mut self) {
        let Some(out) = &mut self.out else { return };
        if self.lines {
            let _ = writeln!(out, "{}: {:.1} s in all", self.what, self.begin.elapsed().as_secs_f64());
        } else if self.shown {
            let _ = write!(out, "\r\x1b[K").and_then(|()| out.flush());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(lines: bool, seconds: &[f64]) -> String {
        let mut out = Vec::new();
        let mut printer = Printer::new("checking 'x'".into(), Some(&mut out), lines);
        for &s in seconds {
            printer.tick(Progress { elapsed: Duration::from_secs_f64(s), image_reached: 3 << 29, base_reached: 0 });
        }
        printer.finish();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn short_calls_are_quiet_on_a_terminal() {
        assert_eq!(printed(false, &[0.2, 0.9]), "");
    }

    #[test]
    fn long_calls_overwrite_one_line_and_take_it_away() {
        let text = printed(false, &[0.8, 1.0, 1.2]);
        assert_eq!(text.matches("\rchecking 'x': 1 s, image at 1.5 GiB\x1b[K").count(), 2);
        assert!(text.ends_with("\r\x1b[K"), "{text:?}");
    }

    #[test]
    fn percent_where_the_end_is_known() {
        let mut out = Vec::new();
        let mut printer = Printer::new("converting 'x'".into(), Some(&mut out), true);
        printer.tick_of(Duration::from_secs(2), 1 << 29, 3 << 29);
        printer.finish();
        let text = String::from_utf8(out).unwrap();
        assert!(text.starts_with("converting 'x': 2 s, 33.3%, 512 MiB of 1.5 GiB\n"), "{text}");
    }

    #[test]
    fn into_a_file_there_is_a_line_a_second() {
        let text = printed(true, &[0.8, 1.0, 1.2, 2.1]);
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.lines().last().unwrap().ends_with("s in all"), "{text}");
    }
}
