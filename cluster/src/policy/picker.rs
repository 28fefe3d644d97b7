//! The policy as a plug-in of Dynamo's router.
//!
//! Dynamo's frontend has two ways to take a plug-in: with its own HTTP server, and by a registry of named ones. The first would open
//! Dynamo's routes, whose preprocessor reads control tokens in a user's text; so it is the second, with the name in a configuration file,
//! which Dynamo reads once.

use std::io::Write;
use std::sync::{Arc, OnceLock};

use dynamo_custom_policy_builtin::default_factory;
use dynamo_kv_router::plugins::RouterPluginRegistry;
use dynamo_kv_router::plugins::worker_selection::{
    WorkerInputView, WorkerInputs, WorkerPicker, WorkerSelectionContext, WorkerSelectionPolicy,
    WorkerSelectionPolicyError, WorkerSelectionPolicyFactory, WorkerSelectionPolicyParameters,
};
use dynamo_kv_router::{KvRouterConfig, RoutingPartitionRef, WorkerType};
use dynamo_llm::kv_router::plugins::install_router_plugin_registry;
use kimi_linear_plan::route::Site;

use super::{Candidate, Policy};
use crate::wire::Role;

/// The policy's name in Dynamo's registry.
const NAME: &str = "kimi-linear";

/// The policy of this process: Dynamo's registry is one for each process, and cannot be changed.
static INSTALLED: OnceLock<Arc<Policy>> = OnceLock::new();

/// Errors when the policy is given to Dynamo.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// Another policy was installed.
    #[error("this process has a routing policy already, and Dynamo takes one for each process")]
    Second,
    /// The configuration that names the policy.
    #[error("cannot write the router's configuration: {0}")]
    File(#[from] std::io::Error),
    /// Dynamo refuses it.
    #[error("Dynamo does not take the routing policy: {0}")]
    Refused(String),
}

/// Chooses prefill workers.
struct Picker {
    policy: Arc<Policy>,
    candidates: Vec<Candidate>,
    /// The row of each candidate in Dynamo's table.
    rows: Vec<usize>,
}

impl Picker {
    fn candidate(
        &self,
        context: &WorkerSelectionContext<'_>,
        row: usize,
        input: WorkerInputView<'_>,
    ) -> Option<Candidate> {
        let worker = input.candidates().get(row)?.worker().worker_id;
        let cached = input.cache().and_then(|cache| cache.get(row));
        let cached = cached.map_or(0, |cache| cache.accounting_cache_estimate().1);
        let load = input.load().and_then(|load| load.get(row));
        let member = self.policy.members().in_role(worker, Role::Prefill);
        let (site, seconds_per_token) = match member {
            Some(member) => (member.site, member.prefill_seconds_per_token),
            None => (Site::Local, None),
        };
        Some(Candidate {
            worker,
            site,
            cached: count(cached.min(context.prompt_tokens())),
            load: load.map_or(0, |load| load.active_prefill_tokens() as u64),
            seconds_per_token,
        })
    }
}

fn count(tokens: usize) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

impl WorkerPicker for Picker {
    fn required_worker_inputs(&self) -> WorkerInputs {
        WorkerInputs::CACHE | WorkerInputs::LOAD
    }

    fn pick(
        &mut self,
        context: &WorkerSelectionContext<'_>,
        input: WorkerInputView<'_>,
    ) -> Result<usize, WorkerSelectionPolicyError> {
        // A pinned worker is the only candidate, and nothing is decided.
        if context.pinned_worker().is_some() {
            return Ok(0);
        }
        self.candidates.clear();
        self.rows.clear();
        for row in 0..input.candidates().len() {
            let Some(candidate) = self.candidate(context, row, input) else {
                continue;
            };
            if !self.policy.members().is_out_of_reach(candidate.worker) {
                self.candidates.push(candidate);
                self.rows.push(row);
            }
        }
        let chosen = self
            .policy
            .choose(count(context.prompt_tokens()), &self.candidates);
        let row = chosen.and_then(|chosen| self.rows.get(chosen).copied());
        row.ok_or_else(|| {
            WorkerSelectionPolicyError::failed("the answers of no prefill worker get here")
        })
    }
}

fn factory(policy: Arc<Policy>) -> WorkerSelectionPolicyFactory {
    let others = default_factory();
    Arc::new(
        move |config: &KvRouterConfig, worker_type, partition: RoutingPartitionRef<'_>| {
            if worker_type != WorkerType::Prefill {
                return others(config, worker_type, partition);
            }
            let picker = Picker {
                policy: Arc::clone(&policy),
                candidates: Vec::new(),
                rows: Vec::new(),
            };
            WorkerSelectionPolicy::new(
                config.clone(),
                worker_type.as_str(),
                Vec::new(),
                Box::new(picker),
            )
        },
    )
}

/// Has Dynamo's routers ask the policy, where they are made with the returned configuration.
///
/// # Errors
/// A second policy in this process, or a file that cannot be written.
pub fn install(
    policy: &Arc<Policy>,
    mut config: KvRouterConfig,
) -> Result<KvRouterConfig, InstallError> {
    let refused = |error: &dyn std::fmt::Display| InstallError::Refused(error.to_string());
    INSTALLED
        .set(Arc::clone(policy))
        .map_err(|_| InstallError::Second)?;
    let mut registry = RouterPluginRegistry::default();
    let made = factory(Arc::clone(policy));
    let provider = Arc::new(move |_: &WorkerSelectionPolicyParameters| Ok(Arc::clone(&made)));
    registry
        .register_worker_selection(NAME, provider)
        .map_err(|error| refused(&error))?;
    if !install_router_plugin_registry(registry) {
        return Err(InstallError::Second);
    }
    let mut file = tempfile::NamedTempFile::new()?;
    write!(
        file,
        "worker_selection:\n  prefill: {NAME}\n  instances:\n    - name: {NAME}\n      type: {NAME}\n"
    )?;
    config.router_policy_config = Some(file.path().display().to_string());
    config.router_prefill_policy = Some(NAME.to_owned());
    // The configuration keeps what it has read, and so do its clones; the file is not needed after that.
    let selected = config.selected_worker_selection_policy_instance_for(WorkerType::Prefill);
    match selected.map_err(|error| refused(&error))? {
        Some(name) if name == NAME => Ok(config),
        other => Err(InstallError::Refused(format!(
            "it would use {}",
            other.as_deref().unwrap_or("its own")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::members::Members;
    use super::super::tests::planner;
    use super::*;
    use crate::policy::Threshold;

    #[test]
    fn dynamo_takes_the_policy_once_and_finds_it_by_its_name() {
        let members = Arc::new(Members::default());
        let policy = Arc::new(Policy::new(members, planner(), Threshold::Auto));
        let config = install(&policy, KvRouterConfig::default()).unwrap();
        config.clone().validate().unwrap();
        let registry = dynamo_llm::kv_router::plugins::router_plugin_registry();
        for role in [
            WorkerType::Prefill,
            WorkerType::Decode,
            WorkerType::Aggregated,
        ] {
            let found = registry.resolve_for_worker_type(&config, role);
            assert!(found.unwrap().is_some(), "{role}");
        }
        let again = install(&policy, KvRouterConfig::default());
        assert!(matches!(again, Err(InstallError::Second)));
    }
}
