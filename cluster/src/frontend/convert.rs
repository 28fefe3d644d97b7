//! Changes of roles that the scheduler orders: a local worker prefills in place of decoding, or the reverse.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kimi_linear_plan::route::Site;
use kimi_linear_plan::scheduler::Role as PlanRole;
use serde::Serialize;
use serde_json::json;

use super::telemetry::Telemetry;
use crate::policy::Policy;
use crate::policy::members::{MemberKey, Members, Reach};
use crate::wire::Role;

/// How long a worker may take until it has its new role: it ends what it has begun first.
const PATIENCE: Duration = Duration::from_secs(300);

/// How long a worker may take to accept an order.
const ORDERING: Duration = Duration::from_secs(30);

/// A change that is under way.
#[derive(Clone, Debug, Serialize)]
pub struct Changing {
    /// Dynamo's id of the worker, in decimal.
    pub id: String,
    /// The role that it had.
    pub from: Role,
    /// The role that it gets.
    pub to: Role,
    /// Seconds since 1970 when it was ordered.
    pub since: f64,
}

/// Changes of roles so far.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Conversions {
    /// Those that the scheduler has ordered.
    pub ordered: u64,
    /// Those that were carried out.
    pub done: u64,
    /// Those that were not.
    pub failed: u64,
    /// The one that is under way.
    pub running: Option<Changing>,
}

fn role(role: PlanRole) -> Role {
    match role {
        PlanRole::Prefill => Role::Prefill,
        PlanRole::Decode => Role::Decode,
    }
}

/// Carries out changes of roles, one at a time.
pub struct Converter {
    policy: Arc<Policy>,
    telemetry: Arc<Telemetry>,
    /// Changes are logged and not carried out.
    only_logged: bool,
    state: Mutex<Conversions>,
}

impl Converter {
    /// A converter of the policy's workers; `only_logged` changes nothing.
    #[must_use]
    pub fn new(policy: Arc<Policy>, telemetry: Arc<Telemetry>, only_logged: bool) -> Arc<Self> {
        Arc::new(Self {
            policy,
            telemetry,
            only_logged,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, Conversions> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes so far.
    #[must_use]
    pub fn conversions(&self) -> Conversions {
        self.state().clone()
    }

    /// Has a worker change its role, in a task of its own.
    pub fn order(self: &Arc<Self>, from: PlanRole, to: PlanRole) {
        let (from, to) = (role(from), role(to));
        self.state().ordered += 1;
        let converter = Arc::clone(self);
        tokio::spawn(async move {
            let done = converter.convert(from, to).await;
            {
                let mut state = converter.state();
                state.running = None;
                match &done {
                    Ok(()) => state.done += 1,
                    Err(_) => state.failed += 1,
                }
            }
            if let Err(reason) = &done {
                tracing::warn!("no worker changes from {from} to {to}: {reason}");
            }
            converter.policy.converted(Instant::now(), done.is_ok());
        });
    }

    async fn convert(&self, from: Role, to: Role) -> Result<(), String> {
        let members = self.policy.members();
        let (key, control) = self
            .idlest(members, from)
            .ok_or("none of the local cluster has a control address")?;
        tracing::info!(worker = key.id, %from, %to, "the scheduler wants a worker to change its role");
        if self.only_logged {
            return Err("--no-role-changes is set".to_owned());
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.state().running = Some(Changing {
            id: key.id.to_string(),
            from,
            to,
            since: now.map_or(0.0, |since| since.as_secs_f64()),
        });
        let body = json!({ "role": to.name() });
        self.telemetry
            .order(&control, "role", &body, ORDERING)
            .await?;
        let changed = async {
            let mut changes = members.changes();
            let reached = || {
                let member = members.in_role(key.id, to);
                member.is_some_and(|member| member.reach == Reach::Reachable)
            };
            while !reached() && changes.changed().await.is_ok() {}
        };
        match tokio::time::timeout(PATIENCE, changed).await {
            Ok(()) => {
                tracing::info!(worker = key.id, %from, %to, "a worker has changed its role");
                Ok(())
            }
            Err(_) => Err(format!(
                "worker {} has accepted, but is not back after {} s",
                key.id,
                PATIENCE.as_secs()
            )),
        }
    }

    /// The local worker of a role with the fewest answers, and its control address.
    fn idlest(&self, members: &Members, role: Role) -> Option<(MemberKey, String)> {
        let of_role = members.all().into_iter().filter(|(_, member)| {
            member.role == role && member.site == Site::Local && member.reach == Reach::Reachable
        });
        let controlled = of_role.filter_map(|(key, member)| Some((key, member.control?)));
        controlled.min_by_key(|(key, _)| {
            let told = self.telemetry.worker(key.id);
            told.map_or(0, |told| told.status.running + told.status.waiting)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Threshold;
    use crate::policy::members::Member;
    use crate::policy::planner::{Expected, Planner};
    use crate::wire::Registration;
    use axum::Json;
    use axum::routing::post;
    use kimi_linear_plan::profile::Profile;
    use serde_json::Value;
    use tokio::net::TcpListener;
    use tokio::runtime::Handle;

    fn planner() -> Planner {
        Planner {
            prfaas: Profile::open("48b-h200").unwrap(),
            local: Profile::open("48b-h200").unwrap(),
            link_bits_per_second: 1e9,
            expected: Expected::parse("lognormal:7,1,16,8192", None).unwrap(),
            options: Default::default(),
        }
    }

    fn join(members: &Members, id: u64, role: Role, control: Option<&str>) -> MemberKey {
        let registration = Registration {
            cluster: "local".to_owned(),
            role,
            control: control.map(str::to_owned),
            prefill_seconds_per_token: None,
            decode_seconds_per_token: None,
        };
        let key = MemberKey {
            endpoint: format!("n/{role}/generate"),
            id,
        };
        let mut member = Member::new("m".to_owned(), role, Some(registration));
        member.reach = Reach::Reachable;
        members.put(key.clone(), member);
        key
    }

    /// A worker's control that answers all orders alike, and passes them on.
    async fn control(answer: Value) -> (String, tokio::sync::mpsc::UnboundedReceiver<Value>) {
        let (orders, received) = tokio::sync::mpsc::unbounded_channel();
        let take = move |Json(order): Json<Value>| async move {
            orders.send(order).unwrap();
            Json(answer)
        };
        let app = axum::Router::new().route("/engine/update/role", post(take));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        (format!("http://{address}"), received)
    }

    fn converter(only_logged: bool) -> (Arc<Converter>, Arc<Members>) {
        let members = Arc::new(Members::default());
        let policy = Arc::new(Policy::new(
            Arc::clone(&members),
            planner(),
            Threshold::Auto,
        ));
        let telemetry = Arc::new(Telemetry::new(Handle::current()).unwrap());
        (Converter::new(policy, telemetry, only_logged), members)
    }

    async fn ended(converter: &Converter) -> Conversions {
        loop {
            let found = converter.conversions();
            if found.done + found.failed == found.ordered {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_worker_is_ordered_and_waited_for() {
        let (converter, members) = converter(false);
        let (url, mut orders) = control(json!({ "status": "accepted", "role": "decode" })).await;
        join(&members, 1, Role::Prefill, None);
        let key = join(&members, 2, Role::Prefill, Some(&url));
        converter.order(PlanRole::Prefill, PlanRole::Decode);
        assert_eq!(orders.recv().await, Some(json!({ "role": "decode" })));
        let running = converter.conversions().running.unwrap();
        assert_eq!((running.id.as_str(), running.to), ("2", Role::Decode));
        members.remove(&key);
        join(&members, 2, Role::Decode, Some(&url));
        let found = ended(&converter).await;
        assert_eq!((found.ordered, found.done, found.failed), (1, 1, 0));
        assert!(found.running.is_none());
    }

    #[tokio::test]
    async fn a_refusal_a_missing_worker_and_a_mere_wish_are_no_change() {
        let (converter, members) = converter(false);
        converter.order(PlanRole::Prefill, PlanRole::Decode);
        assert_eq!(ended(&converter).await.failed, 1);
        let (url, mut orders) = control(json!({ "status": "error", "message": "busy" })).await;
        join(&members, 2, Role::Prefill, Some(&url));
        converter.order(PlanRole::Prefill, PlanRole::Decode);
        assert_eq!(ended(&converter).await.failed, 2);
        assert!(orders.recv().await.is_some());
        let (logging, members) = self::converter(true);
        join(&members, 2, Role::Prefill, Some(&url));
        logging.order(PlanRole::Prefill, PlanRole::Decode);
        assert_eq!(ended(&logging).await.failed, 1);
        assert!(orders.try_recv().is_err());
    }
}
