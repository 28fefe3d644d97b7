//! The one selection of token and heads that all views share.

use kimi_linear::model::{TraceChoice, TraceHead};

/// The selection that every view shows. A click in a view changes it; all others follow at the next frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// A token's position in its sequence; `None` follows the newest one.
    pub token: Option<usize>,
    /// The KDA head.
    pub kda: Option<TraceHead>,
    /// The MLA head.
    pub mla: Option<TraceHead>,
}

impl Selection {
    /// The selected heads, as part of a request. When they change, the app runs the conversation's last tokens again, traced
    /// for the new heads; their frames replace the old ones.
    #[must_use]
    pub fn choice(&self) -> TraceChoice {
        TraceChoice {
            kda: self.kda,
            mla: self.mla,
            vectors: true,
        }
    }
}
