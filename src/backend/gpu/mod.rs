//! What both GPU backends do alike on the host: the tables behind handles, and what a submission gives back.

pub(super) mod answers;
pub(super) mod memory;
