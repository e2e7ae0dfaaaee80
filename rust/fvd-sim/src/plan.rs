// SPDX-License-Identifier: MIT OR Apache-2.0
//! A run as data: what the guest asks for in each session, what fails, and when the power goes.
//! Drawn from a seed, or written by hand; a plan that fails is shrunk by leaving parts out.

use crate::disk::Keep;
use crate::options::Options;
use crate::world::Failures;
use fvd_engine::Repair;

/// What the guest does. Cells are numbered from the start of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// Writes cells.
    Write {
        /// The first cell.
        first: u64,
        /// How many.
        count: u64,
        /// Durable at its end.
        fua: bool,
    },
    /// Makes cells read as zero.
    Zero {
        /// The first cell.
        first: u64,
        /// How many.
        count: u64,
        /// The storage may be given back.
        may_unmap: bool,
        /// Durable at its end.
        fua: bool,
    },
    /// Discards cells.
    Discard {
        /// The first cell.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Reads cells.
    Read {
        /// The first cell.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Asks where cells are.
    Status {
        /// The first cell.
        first: u64,
        /// How many.
        count: u64,
    },
    /// Flushes.
    Flush,
    /// Grows the disk by so many cells.
    Grow {
        /// How many; a multiple of 512 bytes.
        cells: u64,
    },
    /// Shrinks the disk by so many cells; it keeps some.
    Shrink {
        /// How many; a multiple of 512 bytes.
        cells: u64,
    },
    /// Records another name of the base.
    ChangeBase,
    /// Gives a compact image growth steps of another length.
    Amend {
        /// Chunks of a step.
        chunks: u64,
    },
    /// Gives every block back to the base.
    Empty,
    /// Checks the image, and repairs it, though it is sound.
    Check {
        /// What may be repaired.
        repair: Repair,
    },
    /// Reads or writes beyond the end of the disk.
    Beyond {
        /// Writes.
        write: bool,
    },
    /// Time passes.
    Sleep {
        /// Nanoseconds.
        ns: u64,
    },
    /// The base comes or goes.
    Attach {
        /// It comes.
        attached: bool,
    },
    /// Everything under way ends.
    Drain,
}

/// One thing that the guest does, and by which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What.
    pub act: Act,
    /// By which queue.
    pub queue: u8,
    /// Reads and writes go the way QEMU takes: lookup, own I/O, end.
    pub shim: bool,
    /// Address of the memory, modulo 4096.
    pub address: u16,
}

/// A power cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// After so many host operations of the session.
    pub at: u64,
    /// What survives.
    pub keep: Keep,
}

/// One session: open, requests, and a close unless the power goes.
#[derive(Clone, Debug)]
pub struct Session {
    /// What is left to chance.
    pub seed: u64,
    /// The power cut, if there is one.
    pub cut: Option<Cut>,
    /// What fails.
    pub failures: Failures,
    /// What the guest does.
    pub steps: Vec<Step>,
    /// Where the power goes: seeds of other outcomes, which are recovered on the side.
    pub branches: Vec<u64>,
    /// After the session, damage of this kind is tried on a copy of the file.
    pub damage: Option<u64>,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The image and the host.
    pub options: Options,
    /// Power cuts during the creation, one after the other, before it succeeds.
    pub create_cuts: Vec<Cut>,
    /// The sessions.
    pub sessions: Vec<Session>,
}

impl Plan {
    /// Number of steps.
    pub fn steps(&self) -> usize {
        self.sessions.iter().map(|s| s.steps.len()).sum()
    }

    /// The plan as text: what a person needs to see what happens.
    pub fn describe(&self) -> String {
        let mut out = format!("{:#?}\n", self.options);
        for cut in &self.create_cuts {
            out += &format!("creation, cut after {} operations: {:?}\n", cut.at, cut.keep);
        }
        for (i, session) in self.sessions.iter().enumerate() {
            out += &format!("session {i}, seed {:#x}", session.seed);
            if session.failures != Failures::default() {
                out += &format!(", {:?}", session.failures);
            }
            out += "\n";
            for step in &session.steps {
                out += &format!("    {:?} queue {} shim {} address {}\n", step.act, step.queue, step.shim, step.address);
            }
            match &session.cut {
                Some(cut) => out += &format!("    power cut after {} operations: {:?}, branches {:x?}\n", cut.at, cut.keep, session.branches),
                None => out += "    close\n",
            }
            if let Some(damage) = session.damage {
                out += &format!("    damage {damage:#x}\n");
            }
        }
        out
    }
}
