//! The desktop app: chat with a model, and views of what its memory does with each token.
//!
//! The interface never waits: the model runs behind a session, which takes commands and gives events. The views read what
//! the events brought ([`history`], [`measure`], [`facts`]) and share one [`selection`].

pub mod facts;
pub mod formulas;
pub mod history;
pub mod measure;
pub mod selection;
pub mod theme;
pub mod views;
