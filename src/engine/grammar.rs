//! Grammars that constrain answers: what the engine needs of one, not how it is parsed.

use std::fmt::Debug;

use serde::{Deserialize, Serialize};

/// A grammar that constrains answers. Every answer gets a guide of its own.
pub trait Grammar: Debug + Send + Sync {
    /// A guide at the start of an answer.
    fn guide(&self) -> Box<dyn Guide>;

    /// Its source, from which an engine in another process can compile it; `None` for a grammar that has none.
    fn source(&self) -> Option<GrammarSource> {
        None
    }
}

/// A grammar as text.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrammarSource {
    /// The grammar, in llguidance's dialect of Lark.
    pub lark: String,
    /// The tokens that end an answer where it is complete.
    pub stop_ids: Vec<u32>,
}

/// The position of one answer in its grammar.
pub trait Guide: Send {
    /// Bit mask of allowed next tokens: bit `id % 32` of word `id / 32`. Ids past the last word are not allowed. If the
    /// answer may end here, its stop tokens are allowed.
    ///
    /// # Errors
    /// A grammar that is too expensive to follow, with a description.
    fn allowed(&mut self) -> Result<Vec<u32>, String>;

    /// Advances by a sampled token. Returns whether no token can follow.
    ///
    /// # Errors
    /// A token that the grammar does not allow here.
    fn take(&mut self, token: u32) -> Result<bool, String>;
}
