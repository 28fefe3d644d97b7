//! The metrics of the status port.

use dynamo_runtime::metrics::MetricsHierarchy;

use super::super::exposition::{Exposition, Kind};
use super::Shown;
use crate::policy::Snapshot;
use crate::wire::{LOCAL, PRFAAS, Role};

impl Shown {
    /// The metrics, and Dynamo's own, in Prometheus' text format.
    pub(super) fn metrics(&self) -> String {
        let mut text = Exposition::default();
        let snapshot = self.policy.snapshot();
        self.request_metrics(&mut text, &snapshot);
        self.cluster_metrics(&mut text, &snapshot);
        let mut text = text.into_text();
        if let Some(runtime) = &self.runtime {
            match runtime.metrics().prometheus_expfmt() {
                Ok(dynamo) => text.push_str(&dynamo),
                Err(error) => tracing::warn!("Dynamo's metrics cannot be read: {error:#}"),
            }
        }
        text
    }

    fn request_metrics(&self, text: &mut Exposition, snapshot: &Snapshot) {
        let (counted, sums) = (self.totals.counted(), snapshot.sums);
        let by_site = [(LOCAL, sums.local), (PRFAAS, sums.prfaas)];
        let name = "kimi_linear_cluster_prefills_total";
        text.metric(
            name,
            Kind::Counter,
            "Prompts by the cluster that prefilled them.",
        );
        for (site, count) in by_site {
            text.sample(name, &[("cluster", site)], count);
        }
        let name = "kimi_linear_cluster_prefill_tokens_total";
        text.metric(name, Kind::Counter, "Tokens of these prompts.");
        for (site, count) in [(LOCAL, sums.local_tokens), (PRFAAS, sums.prfaas_tokens)] {
            text.sample(name, &[("cluster", site)], count);
        }
        let name = "kimi_linear_cluster_requests_total";
        text.metric(name, Kind::Counter, "Requests that have ended, by how.");
        let ended = [
            ("finished", counted.finished),
            ("cancelled", counted.cancelled),
            ("failed", counted.failed),
        ];
        for (outcome, count) in ended {
            text.sample(name, &[("outcome", outcome)], count);
        }
        let singles = [
            (
                "requests_running",
                Kind::Gauge,
                "Requests that run.",
                counted.running,
            ),
            (
                "aggregated_total",
                Kind::Counter,
                "Answers by workers that prefill and decode their own requests.",
                counted.aggregated,
            ),
            (
                "migrations_total",
                Kind::Counter,
                "Times that an answer went on at another worker, after the loss of its own.",
                counted.migrated,
            ),
            (
                "fallbacks_total",
                Kind::Counter,
                "Prompts whose cluster had no prefill worker.",
                sums.fallbacks,
            ),
            (
                "prompt_tokens_total",
                Kind::Counter,
                "Prompt tokens of answers that have ended.",
                counted.prompt_tokens,
            ),
            (
                "cached_tokens_total",
                Kind::Counter,
                "Those of them that came from a cache.",
                counted.cached_tokens,
            ),
            (
                "generated_tokens_total",
                Kind::Counter,
                "Tokens generated.",
                counted.generated_tokens,
            ),
        ];
        for (name, kind, help, value) in singles {
            text.single(&format!("kimi_linear_cluster_{name}"), kind, help, value);
        }
        let help = "The part of the prompts that the PrfaaS cluster prefilled.";
        let name = "kimi_linear_cluster_offloaded_share";
        text.single(name, Kind::Gauge, help, sums.offloaded());
    }

    fn cluster_metrics(&self, text: &mut Exposition, snapshot: &Snapshot) {
        let nodes = self.policy.members().nodes();
        let name = "kimi_linear_cluster_workers";
        text.metric(
            name,
            Kind::Gauge,
            "Workers that can be reached, by what they do.",
        );
        for (cluster, role, count) in [
            (PRFAAS, Role::Prefill, nodes.prfaas),
            (LOCAL, Role::Prefill, nodes.prefill),
            (LOCAL, Role::Decode, nodes.decode),
            (LOCAL, Role::Both, nodes.both),
        ] {
            text.sample(name, &[("cluster", cluster), ("role", role.name())], count);
        }
        let ready = u8::from(self.backends.missing().is_none());
        let help = "Whether requests can be answered.";
        text.single("kimi_linear_cluster_ready", Kind::Gauge, help, ready);
        let threshold = snapshot
            .threshold
            .map_or_else(|| "+Inf".to_owned(), |tokens| tokens.to_string());
        let help = "Uncached tokens above which a prompt is offloaded.";
        text.single(
            "kimi_linear_cluster_threshold_tokens",
            Kind::Gauge,
            help,
            threshold,
        );
        let conversions = self.converter.conversions();
        let name = "kimi_linear_cluster_conversions_total";
        text.metric(
            name,
            Kind::Counter,
            "Changes of roles that have ended, by how.",
        );
        text.sample(name, &[("outcome", "done")], conversions.done);
        text.sample(name, &[("outcome", "failed")], conversions.failed);
        let told = self.telemetry.told();
        let help = "Bytes of caches that the PrfaaS cluster has sent.";
        let name = "kimi_linear_cluster_link_sent_bytes_total";
        text.single(name, Kind::Counter, help, told.sent_bytes);
        let help = "Bytes that wait at the link out of the PrfaaS cluster.";
        let name = "kimi_linear_cluster_link_queued_bytes";
        text.single(name, Kind::Gauge, help, told.queued_bytes);
        let Some(link) = snapshot.link else { return };
        for (name, help, value) in [
            (
                "link_bits_per_second",
                "The estimate of the link's rate.",
                link.bits_per_second,
            ),
            ("link_used", "The part of that rate in use.", link.used),
            (
                "link_loss",
                "The part of the bytes that were sent again.",
                link.loss,
            ),
            (
                "link_drain_seconds",
                "Seconds until what waits is sent.",
                link.drain_seconds,
            ),
        ] {
            text.single(
                &format!("kimi_linear_cluster_{name}"),
                Kind::Gauge,
                help,
                value,
            );
        }
    }
}
