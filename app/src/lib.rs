//! The app: chat with a model, and views of its state at each token; in a window, or in a browser's tab (`web` there).
//!
//! The interface never blocks: the model runs behind a [`session`], which takes commands and sends updates. The views read
//! the data of the updates ([`history`], [`measure`], [`facts`]) and share one [`selection`].

pub mod chat;
pub mod demo;
pub mod facts;
#[cfg(not(target_arch = "wasm32"))]
pub mod fonts;
pub mod formulas;
pub mod history;
pub mod kept;
pub mod link;
pub mod log;
pub mod markdown;
pub mod math;
pub mod measure;
pub mod problem;
pub mod remembered;
pub mod script;
pub mod selection;
pub mod session;
pub mod settings;
pub mod shell;
pub mod theme;
pub mod try_these;
pub mod views;
#[cfg(target_arch = "wasm32")]
pub mod web;
