//! What changes while requests run: a worker's role, and the threshold.

use std::sync::Arc;

use kimi_linear_cluster::demo::processes::{Process, Role, Threshold};
use kimi_linear_cluster::demo::status::{ClusterState, NewThreshold};

use serde_json::{Value, json};

use super::harness::{
    self, COMPLETIONS, EACH, Known, Single, assert_empties, clients, completion, join, limited,
    start, until,
};

/// Whether the worker with this control address is there in this role, and its answers get to the frontend.
fn has_role(state: &ClusterState, control: &str, role: &str) -> bool {
    let mut workers = state.workers.iter();
    let of = workers.find(|worker| worker.control.as_deref() == Some(control));
    of.is_some_and(|worker| worker.role == role && worker.reach == "reachable")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_changes_without_a_lost_request() {
    limited(600, async {
        let workers = [(Role::Prefill, 2), (Role::Decode, 1), (Role::Prfaas, 1)];
        let mut cluster = start(harness::options("roles", &workers)).await;
        let single = Single::start().await;
        let known = Arc::new(Known::new(&single, 24, 24).await);
        let (seen, tasks) = clients(&cluster.frontend_url(), 6, &known);
        let moved = cluster.worker_url(Process::worker(Role::Prefill, 1));
        for round in 0..2 {
            for role in ["decode", "prefill"] {
                seen.more(6).await;
                cluster.status().set_role(&moved, role).await.unwrap();
                until(&cluster, 60, role, |state| has_role(state, &moved, role)).await;
                println!("round {round}: {role}, {} right", seen.right());
            }
        }
        seen.more(6).await;
        join(&seen, tasks).await;
        assert_eq!(seen.failed(), [], "a request was lost");
        assert!(seen.right() >= 30);
        let split = cluster.status().cluster().await.unwrap().split;
        assert_eq!((split.prefill, split.decode), (2, 1));
        assert_empties(&cluster, 150).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_threshold_moves_from_nothing_to_everything_and_back() {
    limited(600, async {
        let mut cluster = start(harness::options("threshold", &EACH)).await;
        let single = Single::start().await;
        let known = Arc::new(Known::new(&single, 24, 16).await);
        let (seen, tasks) = clients(&cluster.frontend_url(), 6, &known);
        let before = cluster.status().cluster().await.unwrap().requests;
        for threshold in [
            NewThreshold::Tokens(0),
            NewThreshold::Tokens(300),
            NewThreshold::Named("none"),
            NewThreshold::Tokens(u32::MAX - 1),
            NewThreshold::Named("auto"),
            NewThreshold::Tokens(300),
            NewThreshold::Tokens(0),
        ] {
            cluster.status().set_threshold(threshold).await.unwrap();
            seen.more(10).await;
        }
        join(&seen, tasks).await;
        assert_eq!(seen.failed(), [], "a moved threshold is no error");
        let after = cluster.status().cluster().await.unwrap().requests;
        let (local, prfaas) = (after.local - before.local, after.prfaas - before.prfaas);
        println!("{} right: {local} local, {prfaas} prfaas", seen.right());
        assert!(local >= 10 && prfaas >= 10);
        assert_empties(&cluster, 150).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}

/// A profile by which a worker prefills 2,000 tokens a second, and decodes 200 of four sequences.
fn profile() -> Value {
    let prefill = |tokens: u32| json!({ "tokens": tokens, "bytes": 4096 * tokens, "seconds": f64::from(tokens) / 2000.0 });
    json!({
        "name": "test",
        "source": "made up, so that answers of 48 tokens and prompts of 700 want other splits",
        "gpus": 1,
        "prefill": [prefill(64), prefill(4096)],
        "decode": { "slots": 4, "step_seconds": 0.02 },
    })
}

/// Sixteen prompts of so many tokens with answers of so many, and what a single server answers.
async fn load(single: &Single, prompt: usize, answer: usize) -> Arc<Known> {
    let bodies: Vec<Value> = (0..16)
        .map(|number| {
            let mut body = completion(number, prompt, answer);
            // A cached prompt would not be prefill work.
            body["cache_salt"] = json!("alone");
            body
        })
        .collect();
    let mut expected = Vec::new();
    for body in &bodies {
        expected.push(single.choices(COMPLETIONS, body).await);
    }
    Arc::new(Known { bodies, expected })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scheduler_changes_roles_as_the_load_changes() {
    limited(600, async {
        let mut options = harness::options("scheduled", &[(Role::Prefill, 2), (Role::Decode, 1)]);
        options.threshold = Threshold::Auto;
        let file = options.folder.with_extension("profile.json");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, profile().to_string()).unwrap();
        let flags = "--window 40 --settle 20 --replan-every 1s --convert-pause 2s --profile";
        let flags = flags.split(' ').map(str::to_owned);
        options
            .frontend_arguments
            .extend(flags.chain([file.display().to_string()]));
        let mut cluster = start(options).await;
        let single = Single::start().await;
        // Long answers want a second decode worker, long prompts a second prefill worker.
        for (prompt, answer, split) in [(60, 48, (1, 2)), (700, 2, (2, 1)), (60, 48, (1, 2))] {
            let known = load(&single, prompt, answer).await;
            let (seen, tasks) = clients(&cluster.frontend_url(), 6, &known);
            let what = format!("{split:?} for prompts of {prompt} tokens and answers of {answer}");
            until(&cluster, 120, &what, |state| {
                (state.split.prefill, state.split.decode) == split
            })
            .await;
            seen.more(12).await;
            join(&seen, tasks).await;
            assert_eq!(seen.failed(), [], "a request was lost");
            println!("{what}: {} right", seen.right());
        }
        let conversions = cluster.status().cluster().await.unwrap().conversions;
        println!("{conversions:?}");
        assert!(
            conversions.done >= 3 && conversions.failed == 0,
            "{conversions:?}"
        );
        assert_empties(&cluster, 150).await;
        cluster.check().unwrap();
        cluster.shutdown().await;
    })
    .await;
}
