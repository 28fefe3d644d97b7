//! The cases, a file a room of the model.

mod blocks;
mod choice;
mod conv;
mod dense;
mod gates;
mod kda;
mod kda_properties;
mod mla;
mod moe;
mod pools;
mod refusals;
mod rows;

pub use kda::{KdaCase, KdaExpected};

use super::Case;

/// Every case there is.
#[must_use]
pub fn all() -> Vec<Case> {
    let rooms = [
        dense::cases(),
        conv::cases(),
        gates::cases(),
        kda::cases(),
        kda_properties::cases(),
        mla::cases(),
        moe::cases(),
        choice::cases(),
        blocks::cases(),
        pools::cases(),
        refusals::cases(),
    ];
    rooms.into_iter().flatten().collect()
}
