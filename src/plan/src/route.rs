//! Selects the cluster for one request's prefill, and the cached prefix that it continues from.
//!
//! The rule of arXiv 2604.15039, section 3.4.3. While the link is scarce, clusters use only their own prefixes: a request
//! stays local if `total - cached(local) <= t`. While it is ample, the longer of both prefixes counts, and the prefix is
//! copied if the prefill runs on the other cluster.

use serde::Serialize;

/// One of the two clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// The local cluster.
    Local,
    /// The PrfaaS cluster.
    Prfaas,
}

/// Whether the link has capacity beyond what the threshold sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkState {
    /// The link is the scarce resource.
    Scarce,
    /// Prefill is the scarce resource, and the link may be used to reduce it.
    Ample,
}

/// Tokens of a prompt's prefix that each cluster has cached and could continue from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cached {
    /// Tokens at the local cluster.
    pub local: u32,
    /// Tokens at the PrfaaS cluster.
    pub prfaas: u32,
}

impl Cached {
    /// The number at one cluster.
    #[must_use]
    pub fn at(self, site: Site) -> u32 {
        match site {
            Site::Local => self.local,
            Site::Prfaas => self.prfaas,
        }
    }
}

/// The decision for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// The cluster.
    pub site: Site,
    /// Uncached tokens that were compared with the threshold.
    pub uncached: u32,
    /// Tokens of the prefix that are copied from the other cluster before the prefill; 0 for none.
    pub copy: u32,
    /// Tokens that remain to be prefilled.
    pub prefill: u32,
    /// Tokens whose cache is sent to the decode cluster after a prefill on the other one; 0 for a local prefill.
    pub ship: u32,
}

/// Routes a prompt of `total` tokens. At least its last token is always prefilled, because its output is the first token of
/// the answer.
///
/// `pays(site, tokens)` returns whether copying this number of tokens of prefix to `site` is faster than prefilling them
/// there.
pub fn route(
    total: u32,
    cached: Cached,
    threshold: u32,
    link: LinkState,
    pays: impl Fn(Site, u32) -> bool,
) -> Decision {
    let usable = total.saturating_sub(1);
    let cached = Cached {
        local: cached.local.min(usable),
        prfaas: cached.prfaas.min(usable),
    };
    let known = match link {
        LinkState::Scarce => cached.local,
        LinkState::Ample => cached.local.max(cached.prfaas),
    };
    let uncached = total - known;
    let site = if uncached <= threshold {
        Site::Local
    } else {
        Site::Prfaas
    };
    let own = cached.at(site);
    let missing = cached.local.max(cached.prfaas) - own;
    let copy = if link == LinkState::Ample && missing > 0 && pays(site, missing) {
        missing
    } else {
        0
    };
    Decision {
        site,
        uncached,
        copy,
        prefill: total - own - copy,
        ship: match site {
            Site::Local => 0,
            Site::Prfaas => total - cached.local,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decide(local: u32, prfaas: u32, link: LinkState) -> Decision {
        route(10_000, Cached { local, prfaas }, 4000, link, |_, _| true)
    }

    #[test]
    fn while_the_link_is_scarce_each_cluster_goes_by_its_own_prefix() {
        let away = decide(0, 8000, LinkState::Scarce);
        assert_eq!((away.site, away.uncached), (Site::Prfaas, 10_000));
        assert_eq!((away.copy, away.prefill, away.ship), (0, 2000, 10_000));
        let kept = decide(6000, 0, LinkState::Scarce);
        assert_eq!((kept.site, kept.prefill, kept.ship), (Site::Local, 4000, 0));
        // At exactly the threshold it stays local.
        assert_eq!(decide(5999, 0, LinkState::Scarce).site, Site::Prfaas);
    }

    #[test]
    fn while_it_is_ample_the_longer_prefix_counts_and_is_copied() {
        let kept = decide(1000, 8000, LinkState::Ample);
        assert_eq!(
            (kept.site, kept.copy, kept.prefill),
            (Site::Local, 7000, 2000)
        );
        let away = decide(3000, 1000, LinkState::Ample);
        assert_eq!((away.site, away.copy), (Site::Prfaas, 2000));
        assert_eq!((away.prefill, away.ship), (7000, 7000));
        let cached = Cached {
            local: 3000,
            prfaas: 1000,
        };
        let dear = route(10_000, cached, 4000, LinkState::Ample, |_, _| false);
        assert_eq!((dear.copy, dear.prefill, dear.ship), (0, 9000, 7000));
    }

    proptest! {
        #[test]
        fn every_token_is_cached_copied_or_prefilled(
            total in 1u32..200_000, local in 0u32..300_000, prfaas in 0u32..300_000,
            threshold in 0u32..200_000, ample: bool, worth: bool,
        ) {
            let cached = Cached { local, prfaas };
            let link = if ample { LinkState::Ample } else { LinkState::Scarce };
            let decision = route(total, cached, threshold, link, |_, _| worth);
            prop_assert!(decision.prefill >= 1);
            let own = cached.at(decision.site).min(total - 1);
            prop_assert_eq!(own + decision.copy + decision.prefill, total);
            prop_assert_eq!(decision.site == Site::Prfaas, decision.uncached > threshold);
            prop_assert_eq!(decision.ship > 0, decision.site == Site::Prfaas);
            if !ample || !worth {
                prop_assert_eq!(decision.copy, 0);
            }
        }
    }
}
