//! The desktop app: chat with a model, and views of what its memory does with each token.
//!
//! The interface never waits: the model runs behind a [`session`], which takes commands and gives updates. The views read
//! what the updates brought ([`history`], [`measure`], [`facts`]) and share one [`selection`].

pub mod chat;
pub mod demo;
pub mod facts;
pub mod fonts;
pub mod formulas;
pub mod history;
pub mod log;
pub mod markdown;
pub mod measure;
pub mod problem;
pub mod script;
pub mod selection;
pub mod session;
pub mod settings;
pub mod shell;
pub mod theme;
pub mod try_these;
pub mod views;
