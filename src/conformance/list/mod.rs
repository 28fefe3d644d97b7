//! The cases, a file a room of the model.

mod dense;
mod gates;
mod kda;
mod kda_properties;
mod moe;
mod rows;

pub use kda::{KdaCase, KdaExpected};

use super::Case;

/// Every case there is.
#[must_use]
pub fn all() -> Vec<Case> {
    let rooms = [dense::cases(), gates::cases(), kda::cases(), kda_properties::cases(), moe::cases()];
    rooms.into_iter().flatten().collect()
}
