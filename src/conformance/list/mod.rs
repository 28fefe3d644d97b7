//! The cases, a file a room of the model.

mod kda;
mod kda_properties;

pub use kda::{KdaCase, KdaExpected};

use super::Case;

/// Every case there is.
#[must_use]
pub fn all() -> Vec<Case> {
    let rooms = [kda::cases(), kda_properties::cases()];
    rooms.into_iter().flatten().collect()
}
