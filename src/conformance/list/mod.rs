//! The cases, a file a room of the model.

mod choice;
mod conv;
mod dense;
mod gates;
mod kda;
mod kda_properties;
mod mla;
mod moe;
mod rows;

pub use kda::{KdaCase, KdaExpected};

use super::Case;

/// Every case there is.
#[must_use]
pub fn all() -> Vec<Case> {
    let rooms = [
        choice::cases(),
        conv::cases(),
        mla::cases(),
        dense::cases(),
        gates::cases(),
        kda::cases(),
        kda_properties::cases(),
        moe::cases(),
    ];
    rooms.into_iter().flatten().collect()
}
