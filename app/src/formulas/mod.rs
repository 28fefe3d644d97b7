//! Computations of the views on trace data: pure functions, each with its formula, tested against naive code.
//!
//! All arithmetic is in double precision; nothing here depends on the interface.

pub mod experts;
pub mod implicit;
pub mod memory;
pub mod recurrence;
pub mod remembers;
pub mod sharpness;
pub mod spread;
