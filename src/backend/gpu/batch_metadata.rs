//! A batch as kernels read it: one list of words, written once per submission. [`layout`](super::layout) names the words.
//!
//! It also has the counts that grid sizes follow from. The batch itself was checked before.

use bytemuck::Pod;

use super::draw_metadata::{DrawCounts, draw_words};
use super::layout::{
    CheckpointWords, ChunkWords, CutWords, FED, Header, NONE, OutputWords, ScanWords, SegmentWords,
    SpanWords, SpannedWords, TileWords, WindowWords,
};
use crate::backend::check::Demands;
use crate::backend::{Batch, Capacity, DrawCapacity, Result, Rows, Segment};
use crate::error::BackendError;

/// Tokens per chunk of the recurrence.
const CHUNK: usize = 16;
/// A span's length is a multiple of this number of positions, because kernels read as many at a time.
const SPAN_STEP: usize = 32;
/// Minimum number of chunks in a split of a segment. Splits are scanned in parallel.
const SPLIT_CHUNKS: usize = 24;
/// Below this number of splits, a single scan of the segment is faster.
const FEWEST_SPLITS: usize = 4;
/// Above this number of splits there is no gain: their entry states are computed one after the other.
pub(in crate::backend) const MOST_SPLITS: usize = 8;
/// Queries per tile of a prefill.
const QUERIES: usize = 16;

/// The index of the header word that counts a tensor's rows.
pub(in crate::backend) fn count_word(rows: Rows) -> u32 {
    match rows {
        Rows::Tokens => Header::Tokens as u32,
        Rows::Outputs => Header::Outputs as u32,
    }
}

/// Positions that a prefill expands together, and the number of query tiles that attend to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct Window {
    /// Number of positions.
    pub(in crate::backend) positions: usize,
    /// Query tiles of its segment.
    pub(in crate::backend) tiles: usize,
}

/// The words, and the counts that the host uses.
#[derive(Debug, Default)]
pub(in crate::backend) struct BatchMetadata {
    pub(in crate::backend) words: Vec<u32>,
    pub(in crate::backend) tokens: usize,
    pub(in crate::backend) segments: usize,
    pub(in crate::backend) outputs: usize,
    /// Number of positions up to the end of the longest context.
    pub(in crate::backend) reached: usize,
    /// Rows of segments of several tokens.
    pub(in crate::backend) several_rows: usize,
    /// Segments of at most one token.
    pub(in crate::backend) short_segments: usize,
    /// Chunks of segments of several tokens, and of all segments.
    pub(in crate::backend) several_chunks: usize,
    pub(in crate::backend) chunks: usize,
    /// Scans, each of which runs over consecutive chunks: of segments of several tokens, and of all segments.
    pub(in crate::backend) several_scans: usize,
    pub(in crate::backend) scans: usize,
    /// Scans that are a split of a segment, and segments that are cut into splits.
    pub(in crate::backend) splits: usize,
    pub(in crate::backend) cuts: usize,
    /// Query tiles of segments of several tokens, if the step attends to latents.
    several_tiles: usize,
    /// Windows of segments of several tokens, then those of the other segments.
    pub(in crate::backend) windows: Vec<Window>,
    pub(in crate::backend) several_windows: usize,
    /// Spans of single rows.
    pub(in crate::backend) spans: usize,
    /// Draws, if the step samples.
    pub(in crate::backend) draws: DrawCounts,
}

/// What the metadata depends on besides the batch.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct MetadataLayout {
    /// Positions per window.
    pub(in crate::backend) window: usize,
    /// Minimum positions per span.
    pub(in crate::backend) span: usize,
    /// Maximum number of spans of a row; a longer context has longer spans.
    pub(in crate::backend) most_spans: usize,
    /// Tokens per block of the latent pool; 1 without one.
    pub(in crate::backend) block_tokens: usize,
}

impl MetadataLayout {
    /// Maximum number of chunks of a batch within `capacity`: each segment and each checkpoint may end in a partial chunk.
    pub(in crate::backend) fn chunks(capacity: &Capacity) -> usize {
        capacity.tokens / CHUNK + capacity.segments + capacity.checkpoints
    }

    /// Maximum number of splits of a batch within `capacity` if a segment has at most `most`.
    pub(in crate::backend) fn splits(capacity: &Capacity, most: usize) -> usize {
        let chunks = Self::chunks(capacity);
        if splits(chunks, most) > 1 {
            chunks / SPLIT_CHUNKS
        } else {
            0
        }
    }

    /// Maximum number of spans of single rows of a batch within `capacity`: each row may end in a partial span.
    pub(in crate::backend) fn spans(&self, capacity: &Capacity) -> usize {
        let positions = capacity.blocks * self.block_tokens;
        let most = capacity.segments.saturating_mul(self.most_spans);
        most.min(positions / self.span + capacity.segments)
    }

    /// Positions per span of a row with this number of positions. It depends on nothing else, so that the row's arithmetic
    /// does not depend on the batch.
    fn span(&self, positions: usize) -> usize {
        let share = positions.div_ceil(self.most_spans);
        self.span.max(share.next_multiple_of(SPAN_STEP))
    }

    /// Maximum number of words of the metadata of a batch within these capacities.
    pub(in crate::backend) fn words(&self, capacity: &Capacity, draws: &DrawCapacity) -> usize {
        let tiles = capacity.tokens / QUERIES + capacity.segments;
        let windows = capacity.blocks * self.block_tokens / self.window + capacity.segments;
        let splits = Self::splits(capacity, MOST_SPLITS);
        Header::WORDS
            + 3 * capacity.tokens
            + SegmentWords::WORDS * capacity.segments
            + OutputWords::WORDS * capacity.outputs
            + capacity.blocks
            + CheckpointWords::WORDS * capacity.checkpoints
            + ChunkWords::WORDS * Self::chunks(capacity)
            + ScanWords::WORDS * (capacity.segments + splits)
            + CutWords::WORDS * splits
            + TileWords::WORDS * tiles
            + WindowWords::WORDS * windows
            + SpanWords::WORDS * self.spans(capacity)
            + SpannedWords::WORDS * capacity.segments
            + draw_words(draws)
    }

    /// Lays out what a step with these demands reads of a batch: windows and tiles if it attends to latents, draws if it
    /// samples. A long segment is cut into at most
    /// `splits` splits, which are scanned in parallel.
    ///
    /// # Errors
    /// A batch whose positions or words do not fit 32 bits.
    pub(in crate::backend) fn metadata(
        &self,
        batch: &Batch,
        demands: &Demands,
        splits: usize,
    ) -> Result<BatchMetadata> {
        let ends = batch.segments.iter();
        let reached = ends.map(|segment| segment.position + segment.length);
        let reached = reached.max().unwrap_or_default();
        let draws = match demands.sample {
            Some(_) => &batch.draws[..],
            None => &[],
        };
        // Every word is a count or an index of one of these.
        for (what, found) in [
            ("the positions of a segment", reached),
            (
                "the words of a batch",
                self.words(&batch.size(), &DrawCapacity::of(draws)),
            ),
        ] {
            if found >= NONE as usize {
                return Err(BackendError::Batch {
                    what: what.to_owned(),
                    expected: format!("fewer than {NONE}"),
                    found: found.to_string(),
                });
            }
        }
        let several = |segment: &&Segment| segment.length > 1;
        let mut metadata = BatchMetadata {
            words: vec![0; Header::WORDS],
            tokens: batch.tokens.len(),
            segments: batch.segments.len(),
            outputs: batch.outputs.len(),
            reached,
            several_rows: batch
                .segments
                .iter()
                .filter(several)
                .map(|segment| segment.length)
                .sum(),
            short_segments: batch.segments.len() - batch.segments.iter().filter(several).count(),
            ..BatchMetadata::default()
        };
        // Segments of several tokens first, then the others.
        let (first, second): (Vec<usize>, Vec<usize>) =
            (0..batch.segments.len()).partition(|i| batch.segments[*i].length > 1);
        let order = [first, second].concat();
        let starts: Vec<usize> = batch.starts().collect();
        metadata.rows(batch, &starts, &order);
        let (chunks, ranges) = metadata.chunks(batch, &starts, &order);
        metadata.segments(batch, &starts, &ranges);
        metadata.list(Header::AtChunks, &chunks);
        metadata.scans(batch, &ranges, splits);
        if demands.latents.is_some() {
            self.windows(&mut metadata, batch, &order);
            self.spanned(&mut metadata, batch);
        }
        metadata.draws(draws);
        metadata.counts();
        Ok(metadata)
    }

    /// Query tiles and windows of positions.
    fn windows(&self, metadata: &mut BatchMetadata, batch: &Batch, order: &[usize]) {
        let (mut tiles, mut windows) = (Vec::new(), Vec::new());
        for i in order {
            let segment = &batch.segments[*i];
            if segment.length == 0 {
                continue;
            }
            let tile = tiles.len();
            tiles.extend((0..segment.length).step_by(QUERIES).map(|first| TileWords {
                segment: word(*i),
                first: word(first),
            }));
            let end = segment.position + segment.length;
            for first in (0..end).step_by(self.window) {
                let positions = self.window.min(end - first);
                windows.push(WindowWords {
                    segment: word(*i),
                    first: word(first),
                    positions: word(positions),
                    tile: word(tile),
                });
                metadata.windows.push(Window {
                    positions,
                    tiles: tiles.len() - tile,
                });
            }
            if segment.length > 1 {
                metadata.several_windows = windows.len();
                metadata.several_tiles = tiles.len();
            }
        }
        metadata.words[Header::TileTotal as usize] = word(tiles.len());
        metadata.list(Header::AtTiles, &tiles);
        metadata.list(Header::AtWindows, &windows);
    }

    /// Spans of the single rows, in the order of those rows.
    fn spanned(&self, metadata: &mut BatchMetadata, batch: &Batch) {
        let (mut spans, mut spanned) = (Vec::new(), Vec::new());
        for segment in batch.segments.iter().filter(|segment| segment.length == 1) {
            let first = spans.len();
            let starts = (0..=segment.position).step_by(self.span(segment.position + 1));
            spans.extend(starts.map(|position| SpanWords {
                row: word(spanned.len()),
                first: word(position),
            }));
            spanned.push(SpannedWords {
                first: word(first),
                count: word(spans.len() - first),
            });
        }
        metadata.spans = spans.len();
        metadata.list(Header::AtSpans, &spans);
        metadata.list(Header::AtSpanned, &spanned);
    }
}

/// The number of splits, at most `most`, of a segment with this number of chunks. It depends on the segment and the layout
/// only, so that arithmetic does not depend on the rest of the batch (`docs/performance/hopper.md`).
fn splits(chunks: usize, most: usize) -> usize {
    let count = most.min(chunks / SPLIT_CHUNKS);
    if count < FEWEST_SPLITS { 1 } else { count }
}

/// A count or an index of a batch whose words were checked to fit.
pub(super) fn word(value: usize) -> u32 {
    value as u32
}

impl BatchMetadata {
    /// Number of rows of this kind.
    pub(in crate::backend) fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
        }
    }

    /// Number of rows of this kind that are single: of single tokens, or of outputs.
    #[cfg(feature = "cuda")]
    pub(in crate::backend) fn few(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens - self.several_rows,
            Rows::Outputs => self.outputs,
        }
    }

    /// The index of the word that counts the positions of a window.
    #[cfg(feature = "cuda")]
    pub(in crate::backend) fn window_word(&self, number: usize) -> u32 {
        let positions = std::mem::offset_of!(WindowWords, positions) / 4;
        self.words[Header::AtWindows as usize] + word(WindowWords::WORDS * number + positions)
    }

    /// Appends a list and writes its offset to the header.
    pub(super) fn list<T: Pod>(&mut self, header: Header, records: &[T]) {
        self.words[header as usize] = word(self.words.len());
        self.words.extend_from_slice(bytemuck::cast_slice(records));
    }

    /// The header's counts.
    fn counts(&mut self) {
        for (header, count) in [
            (Header::Tokens, self.tokens),
            (Header::Segments, self.segments),
            (Header::Outputs, self.outputs),
            (Header::SeveralRows, self.several_rows),
            (Header::SeveralChunks, self.several_chunks),
            (Header::ChunkTotal, self.chunks),
            (Header::SeveralTiles, self.several_tiles),
            (Header::SpanTotal, self.spans),
            (Header::ScanTotal, self.scans),
            (Header::SeveralScans, self.several_scans),
            (Header::SplitTotal, self.splits),
            (Header::CutTotal, self.cuts),
        ] {
            self.words[header as usize] = word(count);
        }
    }

    /// Token ids, their segments, output rows, and the rows in the segments' order.
    fn rows(&mut self, batch: &Batch, starts: &[usize], order: &[usize]) {
        let mut tokens = batch.tokens.clone();
        for fed in &batch.fed {
            tokens[fed.row] = FED | word(fed.draw);
        }
        self.list(Header::AtTokens, &tokens);
        let segments = batch.segments.iter().enumerate();
        let owners = segments.flat_map(|(i, one)| std::iter::repeat_n(word(i), one.length));
        self.list(Header::AtOwners, &owners.collect::<Vec<u32>>());
        let outputs = batch.outputs.iter().map(|output| OutputWords {
            row: word(output.row),
            target: output.target.unwrap_or(NONE),
        });
        self.list(Header::AtOutputs, &outputs.collect::<Vec<_>>());
        let rows = order
            .iter()
            .flat_map(|i| starts[*i]..starts[*i] + batch.segments[*i].length);
        self.list(Header::AtRows, &rows.map(word).collect::<Vec<u32>>());
    }

    /// The segments, followed by their block tables and checkpoints; `ranges` are their chunks.
    fn segments(&mut self, batch: &Batch, starts: &[usize], ranges: &[std::ops::Range<usize>]) {
        let mut at = self.words.len() + SegmentWords::WORDS * batch.segments.len();
        let mut segments = Vec::with_capacity(batch.segments.len());
        let mut behind = Vec::new();
        for ((segment, start), chunks) in batch.segments.iter().zip(starts).zip(ranges) {
            let checkpoints = at + segment.blocks.len();
            segments.push(SegmentWords {
                start: word(*start),
                length: word(segment.length),
                position: word(segment.position),
                slot_in: segment.slot_in.map_or(NONE, |slot| slot.0),
                slot_out: segment.slot_out.0,
                blocks: word(at),
                checkpoints: word(checkpoints),
                checkpoint_count: word(segment.checkpoints.len()),
                chunks: word(chunks.start),
                chunk_count: word(chunks.len()),
            });
            behind.extend(segment.blocks.iter().map(|block| block.0));
            let words = segment
                .checkpoints
                .iter()
                .map(|checkpoint| CheckpointWords {
                    after: word(checkpoint.after),
                    slot: checkpoint.slot.0,
                });
            behind.extend_from_slice(bytemuck::cast_slice(&words.collect::<Vec<_>>()));
            at = checkpoints + CheckpointWords::WORDS * segment.checkpoints.len();
        }
        self.list(Header::AtSegments, &segments);
        self.words.extend(behind);
    }

    /// Chunks of the recurrence, a new one after each checkpoint, and the range of chunks of each segment.
    fn chunks(
        &mut self,
        batch: &Batch,
        starts: &[usize],
        order: &[usize],
    ) -> (Vec<ChunkWords>, Vec<std::ops::Range<usize>>) {
        let mut chunks = Vec::new();
        let mut ranges = vec![0..0; batch.segments.len()];
        for i in order {
            let segment = &batch.segments[*i];
            let begin = chunks.len();
            let mut first = 0;
            let ends = segment.checkpoints.iter();
            let ends = ends.map(|checkpoint| (checkpoint.after, checkpoint.slot.0));
            for (end, slot) in ends.chain([(segment.length, NONE)]) {
                while first < end {
                    let last = end.min(first + CHUNK);
                    chunks.push(ChunkWords {
                        row: word(starts[*i] + first),
                        length: word(last - first),
                        segment: word(*i),
                        slot: if last == end { slot } else { NONE },
                    });
                    first = last;
                }
            }
            ranges[*i] = begin..chunks.len();
            if segment.length > 1 {
                self.several_chunks = chunks.len();
            }
        }
        self.chunks = chunks.len();
        (chunks, ranges)
    }

    /// Scans: splits first, then whole segments, the longest first, then segments of single tokens.
    fn scans(&mut self, batch: &Batch, ranges: &[std::ops::Range<usize>], most: usize) {
        let (mut scans, mut cuts) = (Vec::new(), Vec::new());
        for (i, (segment, chunks)) in batch.segments.iter().zip(ranges).enumerate() {
            let parts = splits(chunks.len(), most);
            let border = |part: usize| chunks.len() * part / parts;
            if parts > 1 {
                cuts.push(CutWords {
                    segment: word(i),
                    split: word(self.splits),
                    splits: word(parts),
                });
            }
            for part in 0..parts {
                let scan = ScanWords {
                    segment: word(i),
                    chunk: word(chunks.start + border(part)),
                    chunks: word(border(part + 1) - border(part)),
                    split: if parts > 1 {
                        word(self.splits + part)
                    } else {
                        NONE
                    },
                };
                scans.push((segment.length > 1, scan));
            }
            if parts > 1 {
                self.splits += parts;
            }
        }
        scans.sort_by_key(|(several, scan)| {
            (scan.split == NONE, !several, std::cmp::Reverse(scan.chunks))
        });
        self.cuts = cuts.len();
        self.scans = scans.len();
        self.several_scans = scans.iter().filter(|(several, _)| *several).count();
        let scans: Vec<ScanWords> = scans.into_iter().map(|(_, scan)| scan).collect();
        self.list(Header::AtScans, &scans);
        self.list(Header::AtCuts, &cuts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Block, Slot};

    /// A batch of single tokens, each after the given number of earlier ones.
    fn batch(positions: &[usize]) -> Batch {
        let segment = |position: &usize| Segment {
            length: 1,
            position: *position,
            slot_in: None,
            slot_out: Slot(0),
            checkpoints: Vec::new(),
            blocks: vec![Block(0); position / 64 + 1],
        };
        Batch {
            tokens: vec![0; positions.len()],
            segments: positions.iter().map(segment).collect(),
            outputs: Vec::new(),
            draws: Vec::new(),
            fed: Vec::new(),
        }
    }

    /// The demands of a step that attends to latents.
    fn attending() -> Demands {
        let layout = crate::backend::LatentLayout {
            layers: 1,
            blocks: 1,
            block_tokens: 64,
            latent: 1,
            rope: 0,
            dtype: crate::config::Dtype::F32,
        };
        Demands {
            latents: Some(layout),
            ..Demands::default()
        }
    }

    /// The first position of each span of each row.
    fn spans(layout: &MetadataLayout, positions: &[usize]) -> Vec<Vec<u32>> {
        let metadata = layout.metadata(&batch(positions), &attending(), 1).unwrap();
        let list = |header: Header| &metadata.words[metadata.words[header as usize] as usize..];
        let spans: &[SpanWords] =
            bytemuck::cast_slice(&list(Header::AtSpans)[..2 * metadata.spans]);
        let spanned = &list(Header::AtSpanned)[..2 * positions.len()];
        let rows = bytemuck::cast_slice::<_, SpannedWords>(spanned)
            .iter()
            .enumerate();
        rows.map(|(row, of)| {
            let spans = &spans[of.first as usize..][..of.count as usize];
            assert!(spans.iter().all(|span| span.row == row as u32));
            spans.iter().map(|span| span.first).collect()
        })
        .collect()
    }

    #[test]
    fn spans_follow_from_the_position_alone_and_are_no_more_than_their_most() {
        let layout = MetadataLayout {
            window: 4096,
            span: 256,
            most_spans: 132,
            block_tokens: 64,
        };
        let positions = [0, 255, 256, 4095, 33_791, 33_792, 131_071, 1_048_575];
        let together = spans(&layout, &positions);
        for (row, position) in together.iter().zip(positions) {
            assert_eq!(spans(&layout, &[position]), std::slice::from_ref(row));
            assert!(row.len() <= 132, "{position}: {}", row.len());
            let span = row.get(1).copied().unwrap_or(256);
            assert!(span >= 256 && span % 32 == 0, "{position}: {span}");
            let starts: Vec<u32> = (0..=position as u32).step_by(span as usize).collect();
            assert_eq!(*row, starts, "{position}");
        }
        assert_eq!(together[3].len(), 16);
        assert_eq!(together[6].len(), 128);
        let capacity = Capacity {
            tokens: positions.len(),
            segments: positions.len(),
            outputs: 0,
            blocks: batch(&positions)
                .segments
                .iter()
                .map(|segment| segment.blocks.len())
                .sum(),
            checkpoints: 0,
        };
        let metadata = layout
            .metadata(&batch(&positions), &attending(), 1)
            .unwrap();
        assert!(metadata.spans <= layout.spans(&capacity));
        assert!(metadata.words.len() <= layout.words(&capacity, &DrawCapacity::NONE));
    }

    #[test]
    fn positions_that_are_no_words_are_refused() {
        let layout = MetadataLayout {
            window: 512,
            span: 512,
            most_spans: usize::MAX,
            block_tokens: 64,
        };
        let mut far = batch(&[0]);
        far.segments[0].position = u32::MAX as usize;
        let error = layout
            .metadata(&far, &attending(), 1)
            .unwrap_err()
            .to_string();
        assert!(error.contains("the positions of a segment"), "{error}");
        assert!(error.contains("4294967296"), "{error}");
    }
}
