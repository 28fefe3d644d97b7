//! Selects the groups to merge: the paper's drop plan, a min-heap of groups by size, O(N log N).
//!
//! The two smallest groups merge and drop one of the two copies that they hold; then the next two, until enough memory is
//! free. A merge frees one copy for any sizes, so the number of merges is minimal. The largest group is at most twice the
//! minimum: the two smallest of `m` groups of `N` instances have at most `2 N / m` members together, and any `m - 1` groups
//! have one of at least `N / (m - 1)`. With sizes that double (a power of two of instances, merged to a power of two of
//! groups) it is the minimum.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The groups to merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Sets of groups, by their indices in the input; each set becomes one group.
    pub merges: Vec<Vec<usize>>,
    /// Bytes that the merges free.
    pub freed: u64,
}

/// Merges groups of `sizes` members until `needed` bytes are free. Each merge frees `copy` bytes, and no group gets more than
/// `most` members. Frees as much as it can if that is not enough.
#[must_use]
pub fn plan(sizes: &[u32], copy: u64, needed: u64, most: u32) -> Plan {
    let mut sets: Vec<Vec<usize>> = (0..sizes.len()).map(|group| vec![group]).collect();
    let mut heap: BinaryHeap<Reverse<(u32, usize)>> = sizes
        .iter()
        .enumerate()
        .map(|(group, size)| Reverse((*size, group)))
        .collect();
    let mut freed = 0;
    while freed < needed && copy > 0 {
        let (Some(Reverse((a, first))), Some(Reverse((b, second)))) = (heap.pop(), heap.pop())
        else {
            break;
        };
        if a + b > most {
            break;
        }
        let moved = std::mem::take(&mut sets[second]);
        sets[first].extend(moved);
        heap.push(Reverse((a + b, first)));
        freed += copy;
    }
    sets.retain(|set| set.len() > 1);
    Plan {
        merges: sets,
        freed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The largest group after the plan.
    fn largest(sizes: &[u32], plan: &Plan) -> u32 {
        let merged = plan
            .merges
            .iter()
            .map(|set| set.iter().map(|g| sizes[*g]).sum());
        merged.chain(sizes.iter().copied()).max().unwrap()
    }

    /// The size of the largest group, minimised over all ways to combine groups to `parts` sets.
    fn exhaustive(sizes: &[u32], parts: usize) -> u32 {
        fn place(sizes: &[u32], sums: &mut Vec<u32>, parts: usize, best: &mut u32) {
            let Some((size, rest)) = sizes.split_first() else {
                if sums.len() == parts {
                    *best = (*best).min(*sums.iter().max().unwrap());
                }
                return;
            };
            for i in 0..sums.len() {
                sums[i] += size;
                place(rest, sums, parts, best);
                sums[i] -= size;
            }
            if sums.len() < parts {
                sums.push(*size);
                place(rest, sums, parts, best);
                sums.pop();
            }
        }
        let mut best = u32::MAX;
        place(sizes, &mut Vec::new(), parts, &mut best);
        best
    }

    #[test]
    fn powers_of_two_are_merged_as_exhaustive_search_would() {
        for instances in [2usize, 4, 8] {
            let sizes = vec![1u32; instances];
            let mut groups = instances / 2;
            while groups >= 1 {
                let merges = (instances - groups) as u64;
                let plan = plan(&sizes, 10, 10 * merges, 8);
                assert_eq!(plan.freed, 10 * merges);
                assert_eq!(largest(&sizes, &plan), exhaustive(&sizes, groups));
                groups /= 2;
            }
        }
    }

    #[test]
    fn three_groups_of_eight_are_where_the_heap_is_not_the_best() {
        // 4 + 2 + 2, although 3 + 3 + 2 is possible: within the bound, but not optimal.
        let sizes = [1; 8];
        let plan = plan(&sizes, 1, 5, 8);
        assert_eq!((largest(&sizes, &plan), exhaustive(&sizes, 3)), (4, 3));
    }

    proptest! {
        #[test]
        fn the_fewest_merges_and_at_most_twice_the_least_largest_group(
            sizes in prop::collection::vec(1u32..4, 2..8), needed in 0u64..80,
        ) {
            let plan = plan(&sizes, 10, needed, u32::MAX);
            let all = 10 * (sizes.len() as u64 - 1);
            prop_assert_eq!(plan.freed, needed.div_ceil(10).saturating_mul(10).min(all));
            let groups = sizes.len() - (plan.freed / 10) as usize;
            let least = exhaustive(&sizes, groups);
            let ours = largest(&sizes, &plan);
            prop_assert!(ours >= least && ours <= 2 * least, "{ours} {least}");
            let mut seen: Vec<usize> = plan.merges.concat();
            let count = seen.len();
            seen.sort_unstable();
            seen.dedup();
            prop_assert_eq!(seen.len(), count, "a group is in two sets");
        }

        #[test]
        fn no_group_is_larger_than_allowed(
            sizes in prop::collection::vec(1u32..4, 2..8), needed in 0u64..80, most in 1u32..9,
        ) {
            let plan = plan(&sizes, 10, needed, most);
            for set in &plan.merges {
                prop_assert!(set.iter().map(|g| sizes[*g]).sum::<u32>() <= most);
            }
        }
    }
}
