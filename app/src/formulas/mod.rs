//! What views compute from a trace's numbers: pure functions, each with its formula, tested against naive code.
//!
//! All arithmetic is in double precision; nothing here knows a window.

pub mod experts;
pub mod implicit;
pub mod memory;
pub mod recurrence;
pub mod spread;
