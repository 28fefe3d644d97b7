//! Answers that must follow a grammar: what the engine asks of one, not how it is parsed.

use std::fmt::Debug;

/// A grammar that answers are held to. Every answer gets a guide of its own.
pub trait Grammar: Debug + Send + Sync {
    /// A guide at the beginning of an answer.
    fn guide(&self) -> Box<dyn Guide>;
}

/// Where one answer is in its grammar.
pub trait Guide: Send {
    /// Which tokens may come next: bit `id % 32` of word `id / 32`. Ids past the last word may not. An answer that may end
    /// here allows its stop tokens.
    ///
    /// # Errors
    /// A grammar that takes too much to follow, in a sentence.
    fn allowed(&mut self) -> Result<Vec<u32>, String>;

    /// Takes the token that was drawn. Returns whether nothing can follow it.
    ///
    /// # Errors
    /// A token that the grammar does not allow here.
    fn take(&mut self, token: u32) -> Result<bool, String>;
}

/// Whether `token` is allowed by such bits.
pub(super) fn allows(bits: &[u32], token: u32) -> bool {
    bits.get(token as usize / 32)
        .is_some_and(|word| word & (1 << (token % 32)) != 0)
}
