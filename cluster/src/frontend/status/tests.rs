//! The status port over HTTP, without Dynamo.

use kimi_linear_plan::profile::Profile;
use tokio::runtime::Handle;

use super::*;
use crate::policy::Candidate;
use crate::policy::members::{Members, Reach};
use crate::policy::planner::{Expected, Planner};
use crate::wire::{Registration, Role};

struct Status {
    http: reqwest::Client,
    base: String,
    policy: Arc<Policy>,
}

fn member(cluster: &str, role: Role, reach: Reach) -> Member {
    let registration = Registration {
        cluster: cluster.to_owned(),
        role,
        control: Some("http://127.0.0.1:9".to_owned()),
        prefill_seconds_per_token: None,
        decode_seconds_per_token: None,
    };
    let mut member = Member::new("m".to_owned(), role, Some(registration));
    member.reach = reach;
    member
}

fn key(role: Role, id: u64) -> MemberKey {
    MemberKey {
        endpoint: format!("n/{role}/generate"),
        id,
    }
}

impl Status {
    async fn start() -> Self {
        let members = Arc::new(Members::default());
        let planner = Planner {
            prfaas: Profile::open("48b-h200").unwrap(),
            local: Profile::open("48b-h200").unwrap(),
            link_bits_per_second: 1e9,
            expected: Expected::parse("lognormal:7,1,16,8192", None).unwrap(),
            options: Default::default(),
        };
        let policy = Policy::new(Arc::clone(&members), planner, Threshold::Fixed(400));
        let policy = Arc::new(policy);
        let telemetry = Arc::new(Telemetry::new(Handle::current()).unwrap());
        let names = vec!["m".to_owned()];
        let shown = Shown {
            backends: Backends::new(names, members, Arc::clone(&telemetry)),
            converter: Converter::new(Arc::clone(&policy), Arc::clone(&telemetry), true),
            policy: Arc::clone(&policy),
            telemetry,
            totals: Arc::default(),
            runtime: None,
        };
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(serve(listener, Arc::new(shown)));
        Self {
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            base,
            policy,
        }
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        let response = self.http.get(format!("{}{path}", self.base)).send().await;
        let response = response.unwrap();
        let status = StatusCode::from_u16(response.status().as_u16()).unwrap();
        (status, response.text().await.unwrap())
    }

    async fn json(&self, path: &str) -> Value {
        let (status, text) = self.get(path).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    async fn put(&self, body: &str) -> (u16, Value) {
        let request = self.http.put(format!("{}/threshold", self.base));
        let request = request.header("content-type", "application/json");
        let response = request.body(body.to_owned()).send().await.unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap())
    }
}

#[tokio::test]
async fn the_cluster_and_its_decisions_are_shown() {
    let status = Status::start().await;
    let members = status.policy.members();
    let unreachable = Reach::Unreachable("set --dyn-host".to_owned());
    members.put(
        key(Role::Prefill, u64::MAX),
        member("prfaas", Role::Prefill, Reach::Reachable),
    );
    members.put(
        key(Role::Decode, 2),
        member("local", Role::Decode, unreachable),
    );
    let candidate = Candidate {
        worker: u64::MAX,
        site: Site::Prfaas,
        cached: 64,
        load: 100,
        seconds_per_token: Some(1.0),
    };
    for total in [300, 1000] {
        status.policy.choose(total, &[candidate]);
    }
    let cluster = status.json("/cluster").await;
    let workers = cluster["workers"].as_array().unwrap();
    assert_eq!(workers.len(), 2);
    let far = workers.iter().find(|it| it["cluster"] == "prfaas").unwrap();
    assert_eq!(far["id"], u64::MAX.to_string());
    assert_eq!(far["reach"], "reachable");
    assert_eq!(far["error"], Value::Null);
    assert_eq!(far["active_prefill_tokens"], 100 + 1000 - 64);
    let near = workers.iter().find(|it| it["role"] == "decode").unwrap();
    assert_eq!(
        (&near["reach"], &near["error"]),
        (&json!("unreachable"), &json!("set --dyn-host"))
    );
    assert_eq!(cluster["ready"], false);
    assert!(
        cluster["missing"]
            .as_str()
            .unwrap()
            .contains("no decode worker")
    );
    assert_eq!(cluster["split"]["prfaas"], 1);
    assert_eq!(cluster["requests"]["prfaas"], 2);
    assert_eq!(cluster["tokens"]["prompt_prfaas"], 1300);
    assert_eq!(cluster["offloaded_share"], 1.0);
    assert_eq!(
        cluster["threshold"],
        json!({ "setting": 400, "tokens": 400 })
    );
    let decided = status.json("/cluster/requests?after=1").await;
    assert_eq!(decided["last"], 2);
    let decision = &decided["requests"][0];
    assert_eq!(
        (&decision["sequence"], &decision["site"]),
        (&json!(2), &json!("prfaas"))
    );
    assert_eq!(
        (&decision["cached_prfaas"], &decision["threshold"]),
        (&json!(64), &json!(400))
    );
    let all = status.json("/cluster/requests").await;
    assert_eq!(all["requests"][0]["fallback"], true);
    let (code, health) = status.get("/health").await;
    assert_eq!(code, StatusCode::SERVICE_UNAVAILABLE);
    assert!(health.contains("no decode worker"));
}

#[tokio::test]
async fn the_threshold_is_moved_by_those_who_know_how() {
    let status = Status::start().await;
    let moved = status.put(r#"{"threshold": 0}"#).await;
    assert_eq!(moved, (200, json!({ "setting": 0, "tokens": 0 })));
    let moved = status.put(r#"{"threshold": "none"}"#).await;
    assert_eq!(moved, (200, json!({ "setting": "none", "tokens": null })));
    for body in [
        r#"{"threshold": "some"}"#,
        r#"{"threshold": -1}"#,
        "{}",
        r#"{"threshold": 1, "x": 2}"#,
        "x",
    ] {
        let (code, answer) = status.put(body).await;
        assert_eq!(code, 400, "{body}");
        assert!(answer["error"].as_str().is_some_and(|it| !it.is_empty()));
    }
    assert_eq!(status.json("/threshold").await["setting"], "none");
    let moved = status.put(r#"{"threshold": "auto"}"#).await;
    assert_eq!(moved, (200, json!({ "setting": "auto", "tokens": null })));
}

#[tokio::test]
async fn the_metrics_are_of_prometheus_form() {
    let status = Status::start().await;
    let (_, text) = status.get("/metrics").await;
    let samples = super::super::exposition::Samples::parse(&text);
    let name = "kimi_linear_cluster_threshold_tokens";
    assert_eq!(samples.sum(name, None), Some(400.0));
    let name = "kimi_linear_cluster_prefills_total";
    assert_eq!(samples.sum(name, Some(("cluster", "prfaas"))), Some(0.0));
    assert_eq!(samples.sum("kimi_linear_cluster_ready", None), Some(0.0));
    // Each metric is described once.
    let mut described: Vec<_> = text.lines().filter(|it| it.starts_with("# TYPE")).collect();
    let count = described.len();
    described.sort_unstable();
    described.dedup();
    assert_eq!(described.len(), count);
    status.put(r#"{"threshold": "none"}"#).await;
    let (_, text) = status.get("/metrics").await;
    assert!(text.contains("kimi_linear_cluster_threshold_tokens +Inf\n"));
}
