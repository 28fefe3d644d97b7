//! Plans and replays as text and SVG. JSON is the same values through serde.

mod burst_svg;
mod burst_text;
mod svg;
mod text;

pub use burst_svg::replay as burst_svg;
pub use burst_text::replay as burst_text;
pub use svg::{plan as plan_svg, replay as replay_svg};
pub use text::{plan as plan_text, replay as replay_text, sweep as sweep_text};
