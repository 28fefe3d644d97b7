//! A batch as kernels see it: one list of words, written once a submission. [`layout`](super::layout) names the words.
//!
//! It also holds the counts that grids are sized by. What a batch may hold was checked before.

use bytemuck::Pod;

use super::layout::{
    CheckpointWords, ChunkWords, CutWords, Header, NONE, OutputWords, ScanWords, SegmentWords,
    SpanWords, SpannedWords, TileWords, WindowWords,
};
use crate::backend::{Batch, Capacity, Result, Rows, Segment};
use crate::error::BackendError;

/// Tokens a chunk of the recurrence.
const CHUNK: usize = 16;
/// Spans are whole runs of so many positions, as kernels take them.
const SPAN_STEP: usize = 32;
/// The fewest chunks of a split of a segment that is scanned in several at once.
const SPLIT_CHUNKS: usize = 24;
/// Fewer splits than these take longer than the segment in one.
const FEWEST_SPLITS: usize = 4;
/// More than these gain nothing: their entry states are found one after the other.
pub(in crate::backend) const MOST_SPLITS: usize = 8;
/// Queries a tile of a prefill.
const QUERIES: usize = 16;

/// Which word of the header counts a tensor's rows.
pub(in crate::backend) fn count_word(rows: Rows) -> u32 {
    match rows {
        Rows::Tokens => Header::Tokens as u32,
        Rows::Outputs => Header::Outputs as u32,
    }
}

/// Positions that a prefill expands together, and what it has to do with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct Window {
    /// Positions in it.
    pub(in crate::backend) positions: usize,
    /// Tiles of queries of its segment.
    pub(in crate::backend) tiles: usize,
}

/// The words, and what the host keeps of them.
#[derive(Debug, Default)]
pub(in crate::backend) struct BatchMetadata {
    pub(in crate::backend) words: Vec<u32>,
    pub(in crate::backend) tokens: usize,
    pub(in crate::backend) segments: usize,
    pub(in crate::backend) outputs: usize,
    /// Positions up to the end of the segment that reaches furthest.
    pub(in crate::backend) reached: usize,
    /// Rows of segments of several tokens.
    pub(in crate::backend) several_rows: usize,
    /// Segments of one token or none.
    pub(in crate::backend) short_segments: usize,
    /// Chunks of segments of several tokens, and of all.
    pub(in crate::backend) several_chunks: usize,
    pub(in crate::backend) chunks: usize,
    /// Runs of chunks that are scanned one after the other: of segments of several tokens, and of all.
    pub(in crate::backend) several_scans: usize,
    pub(in crate::backend) scans: usize,
    /// Those that are a split of a segment, and segments that are cut into splits.
    pub(in crate::backend) splits: usize,
    pub(in crate::backend) cuts: usize,
    /// Tiles of queries of segments of several tokens, where the step attends to latents.
    several_tiles: usize,
    /// Windows of segments of several tokens come first, then those of others.
    pub(in crate::backend) windows: Vec<Window>,
    pub(in crate::backend) several_windows: usize,
    /// Spans of single rows.
    pub(in crate::backend) spans: usize,
}

/// What the metadata depends on beside the batch.
#[derive(Clone, Copy, Debug)]
pub(in crate::backend) struct MetadataLayout {
    /// Positions a window.
    pub(in crate::backend) window: usize,
    /// Positions a span at least.
    pub(in crate::backend) span: usize,
    /// Spans of a row at most; those of a longer one are longer.
    pub(in crate::backend) most_spans: usize,
    /// Tokens a block of the latent pool, or 1 where there is none.
    pub(in crate::backend) block_tokens: usize,
}

impl MetadataLayout {
    /// Chunks of a batch within `capacity`: each segment and each checkpoint may leave one partly filled.
    pub(in crate::backend) fn chunks(capacity: &Capacity) -> usize {
        capacity.tokens / CHUNK + capacity.segments + capacity.checkpoints
    }

    /// Splits of a batch within `capacity` where a segment has at most `most`.
    pub(in crate::backend) fn splits(capacity: &Capacity, most: usize) -> usize {
        let chunks = Self::chunks(capacity);
        if splits(chunks, most) > 1 {
            chunks / SPLIT_CHUNKS
        } else {
            0
        }
    }

    /// Spans of single rows of a batch within `capacity`: every row may leave one partly filled.
    pub(in crate::backend) fn spans(&self, capacity: &Capacity) -> usize {
        let positions = capacity.blocks * self.block_tokens;
        let most = capacity.segments.saturating_mul(self.most_spans);
        most.min(positions / self.span + capacity.segments)
    }

    /// Positions a span of a row that attends to so many. It depends on nothing else, and so does the row's arithmetic.
    fn span(&self, positions: usize) -> usize {
        let share = positions.div_ceil(self.most_spans);
        self.span.max(share.next_multiple_of(SPAN_STEP))
    }

    /// The most words that the metadata of a batch within `capacity` takes.
    pub(in crate::backend) fn words(&self, capacity: &Capacity) -> usize {
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
    }

    /// Lays a batch out; windows and tiles only where the step attends to latents. A long segment is cut into at most
    /// `splits`, which are scanned at once.
    ///
    /// # Errors
    /// A batch whose positions or words do not fit 32 bits.
    pub(in crate::backend) fn metadata(
        &self,
        batch: &Batch,
        attends: bool,
        splits: usize,
    ) -> Result<BatchMetadata> {
        let ends = batch.segments.iter();
        let reached = ends.map(|segment| segment.position + segment.length);
        let reached = reached.max().unwrap_or_default();
        // Every word counts or numbers something of these.
        for (what, found) in [
            ("the positions of a segment", reached),
            ("the words of a batch", self.words(&batch.size())),
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
        if attends {
            self.windows(&mut metadata, batch, &order);
            self.spanned(&mut metadata, batch);
        }
        metadata.counts();
        Ok(metadata)
    }

    /// Tiles of queries and windows of positions.
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

/// Into how many splits a segment of so many chunks is cut, of at most `most`. It follows from the segment and the layout
/// alone, so that arithmetic does not depend on what else is in the batch (`docs/performance/hopper.md`).
fn splits(chunks: usize, most: usize) -> usize {
    let count = most.min(chunks / SPLIT_CHUNKS);
    if count < FEWEST_SPLITS { 1 } else { count }
}

/// A count or a place of a batch whose words were found to fit.
fn word(value: usize) -> u32 {
    value as u32
}

impl BatchMetadata {
    /// How many rows of this kind there are.
    pub(in crate::backend) fn count(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens,
            Rows::Outputs => self.outputs,
        }
    }

    /// How many rows of this kind stand alone: of single tokens, or of outputs.
    pub(in crate::backend) fn few(&self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens => self.tokens - self.several_rows,
            Rows::Outputs => self.outputs,
        }
    }

    /// Which word counts the positions of a window.
    pub(in crate::backend) fn window_word(&self, number: usize) -> u32 {
        let positions = std::mem::offset_of!(WindowWords, positions) / 4;
        self.words[Header::AtWindows as usize] + word(WindowWords::WORDS * number + positions)
    }

    /// Appends a list and notes in the header where it begins.
    fn list<T: Pod>(&mut self, header: Header, records: &[T]) {
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
        self.list(Header::AtTokens, &batch.tokens);
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

    /// The segments, with their block tables and checkpoints behind them; `ranges` are their chunks.
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

    /// Chunks of the recurrence, which start anew at each checkpoint, and those of each segment.
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

    /// Runs of chunks that are scanned one after the other: splits first, then whole segments, the longest first, then
    /// segments of single tokens.
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

    /// A batch of single tokens after so many others each.
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
        }
    }

    /// Where the spans of each row begin.
    fn spans(layout: &MetadataLayout, positions: &[usize]) -> Vec<Vec<u32>> {
        let metadata = layout.metadata(&batch(positions), true, 1).unwrap();
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
        let metadata = layout.metadata(&batch(&positions), true, 1).unwrap();
        assert!(metadata.spans <= layout.spans(&capacity));
        assert!(metadata.words.len() <= layout.words(&capacity));
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
        let error = layout.metadata(&far, true, 1).unwrap_err().to_string();
        assert!(error.contains("the positions of a segment"), "{error}");
        assert!(error.contains("4294967296"), "{error}");
    }
}
