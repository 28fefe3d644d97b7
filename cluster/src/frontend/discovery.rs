//! Follows the workers that register, and lets Dynamo's router know those whose answers get here.
//!
//! Dynamo's watcher reads the list of workers by itself too, every half a minute, so that it may come to know one that has not answered: a
//! request names the workers that it may go to for as long as there is one ([`Members::allowed`]).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use dynamo_kv_router::WorkerType;
use dynamo_llm::model_card::ModelDeploymentCard;
use dynamo_runtime::discovery::{
    DiscoveryEvent, DiscoveryInstance, DiscoveryInstanceId, DiscoveryStream, ModelCardInstanceId,
};
use futures::StreamExt;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio_util::task::AbortOnDropHandle;

use super::probe::{Probe, endpoint_name};
use crate::policy::members::{Member, MemberKey, Members, Reach};
use crate::wire::{Registration, Role};

/// The first pause after a worker has not answered; each is twice as long as the one before.
const PAUSE: Duration = Duration::from_secs(1);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(30);

/// A worker that is followed.
struct Followed {
    instance: DiscoveryInstance,
    serial: u64,
    /// Asks it until it answers.
    _asking: AbortOnDropHandle<()>,
}

/// A worker has answered, with the serial number of the task that asked.
type Answered = (MemberKey, u64);

/// Follows the workers of one namespace.
pub struct Follower {
    namespace: String,
    names: Vec<String>,
    members: Arc<Members>,
    probe: Arc<dyn Probe>,
    workers: HashMap<MemberKey, Followed>,
    next: u64,
    answered: (UnboundedSender<Answered>, UnboundedReceiver<Answered>),
    router: UnboundedSender<anyhow::Result<DiscoveryEvent>>,
}

fn key(id: &ModelCardInstanceId) -> MemberKey {
    MemberKey {
        endpoint: endpoint_name(id),
        id: id.instance_id,
    }
}

/// What a card says of its worker; the reason where it is not followed.
fn member(card: &ModelDeploymentCard, names: &[String]) -> Result<Member, String> {
    let model = card.name();
    if !names.iter().any(|name| name == model) {
        return Err(format!(
            "it serves the model {model}, and this frontend {}; --served-model-name names others",
            names.join(", ")
        ));
    }
    let registration = Registration::of(&card.runtime_config.runtime_data);
    // What Dynamo routes by is the card's role.
    let role = match card.worker_type {
        Some(WorkerType::Prefill) => Role::Prefill,
        Some(WorkerType::Decode) => Role::Decode,
        Some(WorkerType::Aggregated) | None => Role::Both,
        Some(WorkerType::Encode) => return Err("it is an encode worker".to_owned()),
    };
    Ok(Member::new(model.to_owned(), role, registration))
}

impl Follower {
    /// A follower of the workers of `namespace` that serve a model of one of these names, and the stream of those that have answered.
    #[must_use]
    pub fn new(
        namespace: String,
        names: Vec<String>,
        members: Arc<Members>,
        probe: Arc<dyn Probe>,
    ) -> (Self, DiscoveryStream) {
        let (router, mut events) = mpsc::unbounded_channel();
        let follower = Self {
            namespace,
            names,
            members,
            probe,
            workers: HashMap::new(),
            next: 0,
            answered: mpsc::unbounded_channel(),
            router,
        };
        let stream = futures::stream::poll_fn(move |context| events.poll_recv(context));
        (follower, Box::pin(stream))
    }

    /// Follows Dynamo's events to their end.
    pub async fn run(mut self, mut events: DiscoveryStream) {
        loop {
            tokio::select! {
                Some(answered) = self.answered.1.recv() => self.reached(answered),
                event = events.next() => match event {
                    Some(Ok(event)) => self.take(event),
                    Some(Err(error)) => tracing::warn!("discovery: {error:#}"),
                    None => break,
                },
            }
        }
        tracing::error!("discovery has ended: no further workers will be found");
    }

    fn take(&mut self, event: DiscoveryEvent) {
        match event {
            DiscoveryEvent::Added(instance) => self.added(instance),
            DiscoveryEvent::Removed(DiscoveryInstanceId::Model(id)) => self.removed(&key(&id)),
            DiscoveryEvent::Resync(instances) => self.all(instances),
            DiscoveryEvent::Removed(_) | DiscoveryEvent::ModelTaintsUpdated(_) => {}
        }
    }

    /// Takes the list of all workers: others have gone.
    fn all(&mut self, instances: Vec<DiscoveryInstance>) {
        let there: Vec<_> = instances
            .iter()
            .filter_map(|instance| match instance.id() {
                DiscoveryInstanceId::Model(id) => Some(key(&id)),
                _ => None,
            })
            .collect();
        let gone = self.workers.keys().filter(|key| !there.contains(key));
        for key in gone.cloned().collect::<Vec<_>>() {
            self.removed(&key);
        }
        for instance in instances {
            self.added(instance);
        }
    }

    fn added(&mut self, instance: DiscoveryInstance) {
        let DiscoveryInstanceId::Model(id) = instance.id() else {
            return;
        };
        if id.namespace != self.namespace || id.model_suffix.is_some() {
            return;
        }
        let key = key(&id);
        let known = self.workers.get(&key);
        if known.is_some_and(|known| known.instance == instance) {
            return;
        }
        let card = instance.deserialize_model::<ModelDeploymentCard>();
        let member = card
            .map_err(|error| format!("its card cannot be read: {error:#}"))
            .and_then(|card| member(&card, &self.names));
        match member {
            Ok(member) => self.follow(key, id, instance, member),
            Err(reason) => {
                tracing::warn!(
                    "worker {} at {} is not used: {reason}",
                    key.id,
                    key.endpoint
                );
            }
        }
    }

    fn follow(
        &mut self,
        key: MemberKey,
        id: ModelCardInstanceId,
        instance: DiscoveryInstance,
        mut member: Member,
    ) {
        tracing::info!(
            worker = key.id,
            role = %member.role,
            cluster = ?member.site,
            control = member.control.as_deref().unwrap_or("none"),
            "a worker has registered"
        );
        // A card that has changed does not change whether its worker can be reached.
        let before = self.members.get(&key);
        if before.is_some_and(|before| before.reach == Reach::Reachable) {
            member.reach = Reach::Reachable;
        }
        let serial = self.next;
        self.next += 1;
        let asking = Asking {
            model: member.model.clone(),
            id,
            key: key.clone(),
            serial,
            members: Arc::clone(&self.members),
            probe: Arc::clone(&self.probe),
            answered: self.answered.0.clone(),
        };
        self.members.put(key.clone(), member);
        let followed = Followed {
            instance,
            serial,
            _asking: AbortOnDropHandle::new(tokio::spawn(asking.run())),
        };
        self.workers.insert(key, followed);
    }

    fn reached(&mut self, (key, serial): Answered) {
        let followed = self.workers.get(&key);
        // It may have left, or registered anew, since it answered.
        let Some(followed) = followed.filter(|followed| followed.serial == serial) else {
            return;
        };
        self.members.set_reach(&key, Reach::Reachable);
        self.tell(DiscoveryEvent::Added(followed.instance.clone()));
    }

    fn removed(&mut self, key: &MemberKey) {
        let Some(followed) = self.workers.remove(key) else {
            return;
        };
        self.members.remove(key);
        tracing::info!(worker = key.id, "a worker has left");
        // Dynamo's watcher may know it from its own list, even where it was not told.
        self.tell(DiscoveryEvent::Removed(followed.instance.id()));
    }

    fn tell(&self, event: DiscoveryEvent) {
        // Without a router the process ends.
        let _ = self.router.send(Ok(event));
    }
}

/// Asks one worker until it answers.
struct Asking {
    model: String,
    id: ModelCardInstanceId,
    key: MemberKey,
    serial: u64,
    members: Arc<Members>,
    probe: Arc<dyn Probe>,
    answered: UnboundedSender<Answered>,
}

impl Asking {
    async fn run(self) {
        let worker = self.key.id;
        let mut pause = PAUSE;
        let mut failed = false;
        while let Err(reason) = self.probe.ask(&self.model, &self.id).await {
            if failed {
                tracing::debug!(worker, "{reason}");
            } else {
                tracing::error!(worker, "a worker is not used: {reason}");
            }
            failed = true;
            self.members
                .set_reach(&self.key, Reach::Unreachable(reason));
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(LONGEST);
        }
        if failed {
            tracing::info!(worker, "a worker answers now");
        }
        let _ = self.answered.send((self.key, self.serial));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_trait::async_trait;
    use kimi_linear_plan::route::Site;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Fails a number of times.
    struct Failing(AtomicUsize);

    #[async_trait]
    impl Probe for Failing {
        async fn ask(&self, _model: &str, _worker: &ModelCardInstanceId) -> Result<(), String> {
            let left = self.0.load(Ordering::Relaxed);
            if left == 0 {
                return Ok(());
            }
            self.0.store(left - 1, Ordering::Relaxed);
            Err("no answer".to_owned())
        }
    }

    fn instance(namespace: &str, model: &str, id: u64, role: WorkerType) -> DiscoveryInstance {
        let mut card = ModelDeploymentCard::with_name_only(model);
        card.worker_type = Some(role);
        card.runtime_config.runtime_data = Registration {
            cluster: "prfaas".to_owned(),
            role: Role::Prefill,
            control: Some("http://127.0.0.1:9".to_owned()),
            prefill_seconds_per_token: None,
            decode_seconds_per_token: None,
        }
        .runtime_data();
        DiscoveryInstance::Model {
            namespace: namespace.to_owned(),
            component: role.as_str().to_owned(),
            endpoint: "generate".to_owned(),
            instance_id: id,
            card_json: serde_json::to_value(card).unwrap(),
            model_suffix: None,
        }
    }

    struct Followed {
        members: Arc<Members>,
        events: UnboundedSender<anyhow::Result<DiscoveryEvent>>,
        router: DiscoveryStream,
    }

    fn follow(failures: usize) -> Followed {
        let members = Arc::new(Members::default());
        let probe = Arc::new(Failing(AtomicUsize::new(failures)));
        let (follower, router) = Follower::new(
            "n".to_owned(),
            vec!["m".to_owned()],
            Arc::clone(&members),
            probe,
        );
        let (events, mut received) = mpsc::unbounded_channel();
        let stream = futures::stream::poll_fn(move |context| received.poll_recv(context));
        tokio::spawn(follower.run(Box::pin(stream)));
        Followed {
            members,
            events,
            router,
        }
    }

    impl Followed {
        fn send(&self, event: DiscoveryEvent) {
            self.events.send(Ok(event)).unwrap();
        }

        async fn told(&mut self) -> DiscoveryEvent {
            self.router.next().await.unwrap().unwrap()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_router_learns_of_a_worker_once_it_has_answered() {
        let mut followed = follow(2);
        let worker = instance("n", "m", 7, WorkerType::Prefill);
        followed.send(DiscoveryEvent::Added(worker.clone()));
        // The same again, as after a gap in the connection.
        followed.send(DiscoveryEvent::Resync(vec![worker.clone()]));
        let mut changes = followed.members.changes();
        let unreachable = |members: &Members| {
            let all = members.all();
            let reach = all.first().map(|(_, member)| member.reach.clone());
            matches!(reach, Some(Reach::Unreachable(reason)) if reason == "no answer")
        };
        while !unreachable(&followed.members) {
            changes.changed().await.unwrap();
        }
        assert_eq!(followed.told().await, DiscoveryEvent::Added(worker.clone()));
        let all = followed.members.all();
        assert_eq!(all.len(), 1);
        let member = &all[0].1;
        assert_eq!((member.site, member.role), (Site::Prfaas, Role::Prefill));
        assert_eq!(member.reach, Reach::Reachable);
        followed.send(DiscoveryEvent::Removed(worker.id()));
        assert_eq!(followed.told().await, DiscoveryEvent::Removed(worker.id()));
        assert!(followed.members.all().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_changes_its_role_leaves_and_joins() {
        let mut followed = follow(0);
        let before = instance("n", "m", 7, WorkerType::Prefill);
        let after = instance("n", "m", 7, WorkerType::Decode);
        followed.send(DiscoveryEvent::Added(before.clone()));
        assert_eq!(followed.told().await, DiscoveryEvent::Added(before.clone()));
        // What a list does not have has gone.
        followed.send(DiscoveryEvent::Resync(vec![after.clone()]));
        assert_eq!(followed.told().await, DiscoveryEvent::Removed(before.id()));
        assert_eq!(followed.told().await, DiscoveryEvent::Added(after));
        assert!(followed.members.in_role(7, Role::Decode).is_some());
        assert!(followed.members.in_role(7, Role::Prefill).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn workers_of_others_are_left_alone() {
        let mut followed = follow(0);
        for other in [
            instance("another", "m", 1, WorkerType::Decode),
            instance("n", "another", 2, WorkerType::Decode),
            instance("n", "m", 3, WorkerType::Encode),
        ] {
            followed.send(DiscoveryEvent::Added(other));
        }
        let ours = instance("n", "m", 4, WorkerType::Aggregated);
        followed.send(DiscoveryEvent::Added(ours.clone()));
        assert_eq!(followed.told().await, DiscoveryEvent::Added(ours));
        assert!(followed.members.in_role(4, Role::Both).is_some());
        assert_eq!(followed.members.all().len(), 1);
    }
}
