//! `tiktoken.model`: lines of `base64(bytes) rank`, and the byte-pair merges that they imply.
//!
//! The file lists no merges. tiktoken merges, again and again, the neighbouring pair whose concatenation has the lowest
//! rank; inside the bytes of one token that always runs the same way, whatever surrounds them, so that the last pair
//! joined is the only one that ever makes this token. One merge a token, in the order of ranks, is therefore exactly
//! tiktoken's encoding. A token that its own bytes never merge into is only ever taken as a whole piece.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine as _;

use crate::error::TokenizerError;

const NO_RANK: u32 = u32::MAX;

/// Reads the lines of a `tiktoken.model`; the index of a token is its rank. `path` is for messages only.
///
/// # Errors
/// A line that is no token and rank, bad base64, a rank given twice, a token given twice, a hole in the ranks, a missing
/// byte.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Vec<Box<[u8]>>, TokenizerError> {
    let path = || path.to_owned();
    let mut by_rank: HashMap<u32, (usize, Box<[u8]>)> = HashMap::new();
    for (line, row) in (1..).zip(text.split(|&b| b == b'\n')) {
        let row = row.trim_ascii();
        if row.is_empty() {
            continue;
        }
        let bad = || TokenizerError::RankLine {
            path: path(),
            line,
            found: shorten(row),
        };
        let mut words = row.split(u8::is_ascii_whitespace).filter(|w| !w.is_empty());
        let (Some(token), Some(rank), None) = (words.next(), words.next(), words.next()) else {
            return Err(bad());
        };
        let rank = std::str::from_utf8(rank)
            .ok()
            .and_then(|r| r.parse::<u32>().ok())
            .ok_or_else(bad)?;
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(token)
            .map_err(|source| TokenizerError::Base64 {
                path: path(),
                line,
                found: shorten(token),
                source,
            })?;
        if let Some((first, _)) = by_rank.get(&rank) {
            return Err(TokenizerError::DuplicateRank {
                path: path(),
                line,
                rank,
                first: *first,
            });
        }
        by_rank.insert(rank, (line, bytes.into()));
    }
    let tokens: Vec<Box<[u8]>> = (0..)
        .map_while(|rank| by_rank.remove(&rank).map(|(_, bytes)| bytes))
        .collect();
    if !by_rank.is_empty() {
        let rank = u32::try_from(tokens.len()).unwrap_or(NO_RANK);
        return Err(TokenizerError::RankHole {
            path: path(),
            rank,
            tokens: tokens.len() + by_rank.len(),
        });
    }
    Ok(tokens)
}

fn shorten(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into_owned(),
    }
}

/// The rank of every token.
///
/// # Errors
/// Two ranks with the same bytes; a single byte that is no token.
pub(super) fn index<'a>(
    path: &Path,
    tokens: &'a [Box<[u8]>],
) -> Result<HashMap<&'a [u8], u32>, TokenizerError> {
    let mut ranks: HashMap<&[u8], u32> = HashMap::with_capacity(tokens.len());
    for (rank, token) in (0u32..).zip(tokens) {
        if let Some(first) = ranks.insert(token, rank) {
            let token = token.escape_ascii().to_string();
            return Err(TokenizerError::DuplicateToken {
                path: path.to_owned(),
                first,
                second: rank,
                token,
            });
        }
    }
    match (0..=255u8).find(|&byte| !ranks.contains_key(&[byte][..])) {
        Some(byte) => Err(TokenizerError::MissingByte {
            path: path.to_owned(),
            byte,
        }),
        None => Ok(ranks),
    }
}

/// Where the last merge that makes this token joins its two halves; `None` for a token that no merge makes.
pub(super) fn last_join(token: &[u8], ranks: &HashMap<&[u8], u32>) -> Option<usize> {
    let rank = |from: usize, to: usize| ranks.get(&token[from..to]).copied().unwrap_or(NO_RANK);
    // A part's start, with the rank of the part joined to the next one; the end of the token comes last.
    let mut parts: Vec<(usize, u32)> = (0..=token.len()).map(|at| (at, NO_RANK)).collect();
    for i in 0..parts.len().saturating_sub(2) {
        parts[i].1 = rank(parts[i].0, parts[i + 2].0);
    }
    while parts.len() > 3 {
        let (i, best) = parts
            .iter()
            .map(|&(_, rank)| rank)
            .enumerate()
            .min_by_key(|&(_, rank)| rank)?;
        if best == NO_RANK {
            return None;
        }
        parts.remove(i + 1);
        for j in [i.checked_sub(1), Some(i)].into_iter().flatten() {
            parts[j].1 = parts
                .get(j + 2)
                .map_or(NO_RANK, |next| rank(parts[j].0, next.0));
        }
    }
    (parts.len() == 3).then(|| parts[1].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_join_follows_the_ranks() {
        let tokens: Vec<&[u8]> = vec![
            b"a", b"b", b"c", b"bc", b"ab", b"abc", b"aa", b"aaa", b"abca", b"ba",
        ];
        let ranks = tokens.iter().zip(0..).map(|(&t, r)| (t, r)).collect();
        assert_eq!(last_join(b"a", &ranks), None);
        assert_eq!(last_join(b"ab", &ranks), Some(1));
        assert_eq!(last_join(b"abc", &ranks), Some(1), "bc has the lower rank");
        assert_eq!(
            last_join(b"aaa", &ranks),
            Some(2),
            "the left pair goes first"
        );
        assert_eq!(last_join(b"abca", &ranks), Some(3));
        assert_eq!(last_join(b"abab", &ranks), Some(2));
        assert_eq!(last_join(b"accc", &ranks), None, "its bytes never merge");
        assert_eq!(last_join(b"", &ranks), None);
    }
}
