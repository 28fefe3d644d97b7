//! A program that several devices run in parts: a program for each of them, and what passes between them in between.
//!
//! `cut` divides a list of operations, of which each has the ranks that run it, into such parts; `compile` compiles these on their
//! ranks, and `step` runs them. Where devices exchange results by themselves, `exchange` joins them and runs their steps, each on a
//! thread of its own. Which ranks run an operation, and on which handles, the backends decide: a [`Group`](super::Group) by degrees
//! of parallelism, a [replica](super::Replicas) by the homes of its layers.

pub(super) mod compile;
pub(super) mod cut;
pub(super) mod exchange;
pub(super) mod step;

use super::{Device, Result};
use crate::error::BackendError;

/// The name of backends of several devices in messages.
const NAME: &str = "several devices";

/// Fails unless all devices compute and cache in the same way; with the first one.
///
/// # Errors
/// No device, and devices of different backends.
pub(super) fn check_alike<'a>(devices: &[&'a Device]) -> Result<&'a Device> {
    let wrong = |what, expected: &str, found: &str| BackendError::Shape {
        operation: NAME,
        what,
        expected: expected.to_owned(),
        found: found.to_owned(),
    };
    let Some(first) = devices.first() else {
        return Err(wrong("their number", "at least 1", "0"));
    };
    let kind = |device: &Device| (device.backend, device.precision, device.cache);
    match devices.iter().find(|device| kind(device) != kind(first)) {
        Some(other) => Err(wrong("the backend of each", first.backend, other.backend)),
        None => Ok(first),
    }
}
