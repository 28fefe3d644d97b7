//! The workers that discovery tells of: where they are, what they do, and whether their answers can get here.

use std::collections::{BTreeMap, HashSet};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use kimi_linear_plan::route::Site;
use serde::Serialize;
use tokio::sync::watch;

use crate::wire::{PRFAAS, Registration, Role};

/// Identifies a registration: a worker that changes its role keeps its id and registers at another endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberKey {
    /// Dynamo's endpoint, `namespace/component/endpoint`.
    pub endpoint: String,
    /// Dynamo's id of the worker.
    pub id: u64,
}

/// Whether a worker's answers can get to this process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reach", content = "error", rename_all = "snake_case")]
pub enum Reach {
    /// It was asked, and has not answered yet.
    Probing,
    /// It has answered.
    Reachable,
    /// It has not answered, or cannot be asked; with the reason.
    Unreachable(String),
}

/// A registered worker.
#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    /// The name of the model that it serves.
    pub model: String,
    /// Its cluster.
    pub site: Site,
    /// Its role.
    pub role: Role,
    /// `http://host:port` of its health, metrics and control.
    pub control: Option<String>,
    /// Seconds that it needs to prefill a token, if it says so.
    pub prefill_seconds_per_token: Option<f64>,
    /// Whether its answers can get here.
    pub reach: Reach,
}

impl Member {
    /// A worker that has registered and was not probed yet. `role` is what Dynamo's card says, for workers of other programs, which
    /// have no [`Registration`] and belong to the local cluster.
    #[must_use]
    pub fn new(model: String, role: Role, registration: Option<Registration>) -> Self {
        let cluster = registration.as_ref().map(|it| it.cluster.as_str());
        let site = match cluster {
            Some(PRFAAS) => Site::Prfaas,
            _ => Site::Local,
        };
        let seconds = registration
            .as_ref()
            .and_then(|it| it.prefill_seconds_per_token)
            .filter(|seconds| seconds.is_finite() && *seconds > 0.0);
        Self {
            model,
            site,
            role,
            control: registration.and_then(|it| it.control),
            prefill_seconds_per_token: seconds,
            reach: Reach::Probing,
        }
    }
}

/// Numbers of reachable workers by what they do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Nodes {
    /// Prefill workers of the PrfaaS cluster.
    pub prfaas: u32,
    /// Prefill workers of the local cluster.
    pub prefill: u32,
    /// Decode workers.
    pub decode: u32,
    /// Workers that prefill and decode their own requests.
    pub both: u32,
}

/// All registered workers of the model. Its users share it; none of its methods waits.
#[derive(Debug)]
pub struct Members {
    table: RwLock<BTreeMap<MemberKey, Member>>,
    changed: watch::Sender<()>,
}

impl Default for Members {
    fn default() -> Self {
        Self {
            table: RwLock::default(),
            changed: watch::Sender::new(()),
        }
    }
}

impl Members {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<MemberKey, Member>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<MemberKey, Member>> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a worker, or replaces what is known of it.
    pub fn put(&self, key: MemberKey, member: Member) {
        self.write().insert(key, member);
        self.changed.send_replace(());
    }

    /// Removes a worker; returns what was known of it.
    pub fn remove(&self, key: &MemberKey) -> Option<Member> {
        let removed = self.write().remove(key);
        self.changed.send_replace(());
        removed
    }

    /// Notes whether a worker's answers get here. A worker that has gone stays gone.
    pub fn set_reach(&self, key: &MemberKey, reach: Reach) {
        if let Some(member) = self.write().get_mut(key) {
            member.reach = reach;
        }
        self.changed.send_replace(());
    }

    /// All workers.
    #[must_use]
    pub fn all(&self) -> Vec<(MemberKey, Member)> {
        let table = self.read();
        let all = table.iter();
        all.map(|(key, member)| (key.clone(), member.clone()))
            .collect()
    }

    /// A registration.
    #[must_use]
    pub fn get(&self, key: &MemberKey) -> Option<Member> {
        self.read().get(key).cloned()
    }

    /// The worker with this id, in a role.
    #[must_use]
    pub fn in_role(&self, id: u64, role: Role) -> Option<Member> {
        let table = self.read();
        let mut all = table.iter();
        let found = all.find(|(key, member)| key.id == id && member.role == role);
        found.map(|(_, member)| member.clone())
    }

    /// Whether the worker with this id is known to be out of reach, or was not reached yet, in every role that it has.
    #[must_use]
    pub fn is_out_of_reach(&self, id: u64) -> bool {
        let table = self.read();
        let mut its = table.iter().filter(|(key, _)| key.id == id).peekable();
        its.peek().is_some() && its.all(|(_, member)| member.reach != Reach::Reachable)
    }

    /// The ids of workers that a request may be sent to; `None` if that is all of them. Dynamo routes to every registered worker after
    /// half a minute at most, so a request names those that answer where there are others.
    #[must_use]
    pub fn allowed(&self) -> Option<HashSet<u64>> {
        let table = self.read();
        let reachable = |member: &Member| member.reach == Reach::Reachable;
        if table.values().all(reachable) {
            return None;
        }
        let ids = table.iter().filter(|(_, member)| reachable(member));
        Some(ids.map(|(key, _)| key.id).collect())
    }

    /// Numbers of reachable workers.
    #[must_use]
    pub fn nodes(&self) -> Nodes {
        let mut nodes = Nodes::default();
        for member in self.read().values() {
            if member.reach != Reach::Reachable {
                continue;
            }
            match (member.role, member.site) {
                (Role::Prefill, Site::Prfaas) => nodes.prfaas += 1,
                (Role::Prefill, Site::Local) => nodes.prefill += 1,
                (Role::Decode, _) => nodes.decode += 1,
                (Role::Both, _) => nodes.both += 1,
            }
        }
        nodes
    }

    /// Tells of every change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: u64) -> MemberKey {
        MemberKey {
            endpoint: "n/c/generate".to_owned(),
            id,
        }
    }

    fn registration(cluster: &str, role: Role) -> Option<Registration> {
        Some(Registration {
            cluster: cluster.to_owned(),
            role,
            control: Some("http://127.0.0.1:1".to_owned()),
            prefill_seconds_per_token: Some(f64::NAN),
            decode_seconds_per_token: None,
        })
    }

    fn member(cluster: &str, role: Role) -> Member {
        Member::new("m".to_owned(), role, registration(cluster, role))
    }

    #[test]
    fn only_workers_that_answer_count_and_may_be_routed_to() {
        let members = Members::default();
        assert_eq!(members.allowed(), None);
        members.put(key(1), member("prfaas", Role::Prefill));
        members.put(key(2), member("local", Role::Decode));
        assert_eq!(members.nodes(), Nodes::default());
        assert_eq!(members.allowed(), Some(HashSet::new()));
        assert!(members.is_out_of_reach(1) && !members.is_out_of_reach(3));
        members.set_reach(&key(1), Reach::Reachable);
        assert_eq!(members.allowed(), Some(HashSet::from([1])));
        members.set_reach(&key(2), Reach::Reachable);
        assert_eq!(members.allowed(), None);
        let nodes = members.nodes();
        assert_eq!((nodes.prfaas, nodes.prefill, nodes.decode), (1, 0, 1));
        assert!(members.remove(&key(1)).is_some());
        members.set_reach(&key(1), Reach::Reachable);
        assert_eq!(members.all().len(), 1);
    }

    #[test]
    fn a_worker_of_another_program_is_local_and_has_its_cards_role() {
        let other = Member::new("m".to_owned(), Role::Both, None);
        assert_eq!((other.site, other.role), (Site::Local, Role::Both));
        assert_eq!(other.control, None);
        // A figure that is no number is none.
        let ours = member("prfaas", Role::Prefill);
        assert_eq!(ours.prefill_seconds_per_token, None);
        assert_eq!(ours.site, Site::Prfaas);
    }
}
