//! The memory in use on each instance.
//!
//! A cache is divided equally, rounded up, among the members of its layout: all of it on one instance, or its layers on the
//! stages of a pipeline.

/// Bytes by instance.
#[derive(Debug)]
pub(super) struct Memory {
    /// Bytes per instance for parameters and caches.
    total: u64,
    /// Bytes of caches.
    pub(super) held: Vec<u64>,
    /// Bytes of parameters, including those that are being loaded.
    pub(super) parameters: Vec<u64>,
    /// Members of each layout; the first ones are single instances.
    layouts: Vec<Vec<usize>>,
    /// Bytes that were allocated and freed, and the maximum in use.
    pub(super) allocated: u64,
    pub(super) freed: u64,
    pub(super) peak: u64,
}

impl Memory {
    pub(super) fn new(instances: usize, total: u64, parameters: u64) -> Self {
        Self {
            total,
            held: vec![0; instances],
            parameters: vec![parameters; instances],
            layouts: (0..instances).map(|instance| vec![instance]).collect(),
            allocated: 0,
            freed: 0,
            peak: 0,
        }
    }

    /// The layout of these members (ascending), created if it does not exist.
    pub(super) fn layout(&mut self, members: &[usize]) -> usize {
        let known = self.layouts.iter().position(|layout| layout == members);
        known.unwrap_or_else(|| {
            self.layouts.push(members.to_vec());
            self.layouts.len() - 1
        })
    }

    pub(super) fn members(&self, layout: usize) -> &[usize] {
        &self.layouts[layout]
    }

    /// A member's share of `bytes`.
    pub(super) fn share(&self, layout: usize, bytes: u64) -> u64 {
        bytes.div_ceil(self.layouts[layout].len() as u64)
    }

    /// Bytes per instance for caches.
    pub(super) fn limit(&self, instance: usize) -> u64 {
        self.total - self.parameters[instance]
    }

    /// Free bytes on every member of a layout.
    pub(super) fn room(&self, layout: usize) -> u64 {
        let left = |i: &usize| self.limit(*i).saturating_sub(self.held[*i]);
        self.layouts[layout].iter().map(left).min().unwrap_or(0)
    }

    /// Allocates `share` bytes on every member, if all have them.
    pub(super) fn take(&mut self, layout: usize, share: u64) -> bool {
        if self.room(layout) < share {
            return false;
        }
        for i in 0..self.layouts[layout].len() {
            self.held[self.layouts[layout][i]] += share;
        }
        self.allocated += share * self.layouts[layout].len() as u64;
        self.peak = self.peak.max(self.allocated - self.freed);
        true
    }

    pub(super) fn give(&mut self, layout: usize, share: u64) {
        for i in 0..self.layouts[layout].len() {
            self.held[self.layouts[layout][i]] -= share;
        }
        self.freed += share * self.layouts[layout].len() as u64;
    }
}
