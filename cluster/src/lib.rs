//! Kimi Linear on NVIDIA Dynamo: workers, a frontend and a routing policy for one cluster or two.

pub mod demo;
pub mod frontend;
pub mod policy;
pub mod settings;
pub mod wire;
pub mod worker;
