//! Text to ids and back.
//!
//! A [`Tokenizer`] is read from `tiktoken.model`, `tokenizer.json` or a GGUF's metadata. [`StreamDecoder`] decodes ids to
//! text one by one; [`ChatTemplate`] and [`Chat`] encode a conversation, in which user text is never encoded as a control
//! token; [`Conversation`] keeps the tokens of one; [`ToolCallParser`] finds tool calls in an answer. Text is encoded
//! with special tokens off unless asked otherwise: control ids come from a chat template, or from a lookup by name. This module does not depend
//! on the model.

mod bytes;
mod chat;
mod config;
mod conversation;
mod gguf;
mod json_file;
mod python_text;
mod ranks;
mod special;
mod split;
mod stream;
mod template;
mod template_source;
mod tojson;
mod tool_calls;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;
use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Vocab};

pub use chat::{Chat, EncodedChat, ROLES};
#[cfg(feature = "server")]
pub(crate) use config::eos_ids;
pub use conversation::Conversation;
pub use gguf::Vocabulary;
pub use stream::{StreamDecoder, TokenText, Utf8Stream};
pub use template::ChatTemplate;
pub use tool_calls::{Marker, ToolCallEvent, ToolCallParser};

use crate::checkpoint::ModelFiles;
use crate::error::TokenizerError;
use bytes::Alphabet;
use config::TokenizerConfig;
use special::Specials;
use split::Splitter;

/// The names of the tokens that end an answer in any configuration.
const STOP_NAMES: [&str; 2] = ["[EOS]", "<|im_end|>"];

/// The contents of a vocabulary file.
struct Parts {
    /// The bytes of the ordinary tokens; the index is the id.
    tokens: Vec<Box<[u8]>>,
    bpe: BPE,
    splitter: Splitter,
    /// The special tokens that the file names.
    declared: BTreeMap<u32, String>,
    /// Of those ids the ones that are declared as not special.
    text: BTreeSet<u32>,
    /// Those of the ids that are not tokens.
    unused: Vec<u32>,
    /// Whether ids without a name in the file are tokens, as in the published tokenizer after its ordinary tokens
    /// (`tokenization_kimi.py`).
    reserves: bool,
    /// Whether text is split by the published pattern, and merges follow from the order of the tokens.
    by_ranks: bool,
}

/// A byte-level byte-pair tokenizer with its special tokens.
pub struct Tokenizer {
    tokens: Vec<Box<[u8]>>,
    specials: Specials,
    alphabet: Alphabet,
    splitter: Splitter,
    bpe: BPE,
    /// Bytes of the longest ordinary token.
    longest: usize,
    /// The ids at which the tokenizer's own files say to stop.
    eos: Vec<u32>,
    /// Special ids that are not tokens, ascending.
    unused: Vec<u32>,
    /// As in [`Parts`].
    by_ranks: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("ordinary", &self.tokens.len())
            .field("vocab_size", &self.vocab_size())
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

/// One token: its bytes, and its name if it is a control token (the bytes are then the name's).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The token's bytes, which need not be whole characters.
    pub bytes: &'a [u8],
    /// The name of a special token.
    pub name: Option<&'a str>,
}

impl<'a> Piece<'a> {
    /// The bytes as text, U+FFFD for those that are no character.
    pub fn text(&self) -> Cow<'a, str> {
        String::from_utf8_lossy(self.bytes)
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint: `tiktoken.model`, or else `tokenizer.json`. `tokenizer_config.json` names
    /// the special tokens; beside a `tiktoken.model` without it they are those of the published model, with a warning.
    /// The stop ids of `generation_config.json` are used if it exists.
    ///
    /// # Errors
    /// A file that is missing, cannot be read or is damaged, each by name and with the line or field.
    pub fn from_dir(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        let alphabet = Alphabet::new();
        let config_path = dir.join("tokenizer_config.json");
        let config = TokenizerConfig::read(&config_path)?;
        let tiktoken = dir.join("tiktoken.model");
        let mut parts = match config::read(&tiktoken)? {
            Some(text) => {
                let mut parts = from_ranks(&tiktoken, &text, &alphabet)?;
                match &config {
                    None => {
                        tracing::warn!(
                            "{} is missing: taking the special tokens to be those of the published model",
                            config_path.display()
                        );
                        parts.declared = special::published(parts.tokens.len() as u32);
                    }
                    Some(config) if config.added.is_empty() => {
                        let (name, expected) = ("added_tokens_decoder", "the special tokens by id");
                        return Err(config::field(&config_path, name, expected, &Value::Null));
                    }
                    Some(_) => {}
                }
                parts
            }
            None => json_file::read(&dir.join("tokenizer.json"), &alphabet)?.ok_or_else(|| {
                TokenizerError::NoTokenizer {
                    dir: dir.to_owned(),
                }
            })?,
        };
        let config = config.unwrap_or_default();
        // Where both declare a token, the configuration counts.
        parts.text.retain(|id| !config.added.contains_key(id));
        parts.text.extend(config.text);
        parts.declared.extend(config.added);
        let mut stops: Vec<&str> = STOP_NAMES.to_vec();
        stops.extend(config.named.get("eos_token").map(String::as_str));
        let eos = config::generation_eos(&dir.join("generation_config.json"))?;
        Self::from_parts(&config_path, parts, alphabet, eos, &stops)
    }

    /// Reads the tokenizer of a model: of its folder as [`Tokenizer::from_dir`] does, or of its GGUF's metadata, where an
    /// answer also ends at `[EOT]`.
    ///
    /// # Errors
    /// As for [`Tokenizer::from_dir`]; metadata of another tokenizer, by name.
    pub fn from_files(files: &ModelFiles) -> Result<Tokenizer, TokenizerError> {
        let gguf = match files {
            ModelFiles::Folder(dir) => return Self::from_dir(dir),
            ModelFiles::Gguf(gguf) => gguf,
        };
        let (metadata, alphabet) = (gguf.metadata(), Alphabet::new());
        let parts = gguf::read(metadata, &alphabet)?;
        let eos = gguf::eos(metadata)?;
        Self::from_parts(metadata.file(), parts, alphabet, eos, &gguf::STOP_NAMES)
    }

    /// `path` is where the special tokens are declared, for messages; `stops` are the names of tokens that end an answer.
    fn from_parts(
        path: &Path,
        parts: Parts,
        alphabet: Alphabet,
        mut eos: Vec<u32>,
        stops: &[&str],
    ) -> Result<Tokenizer, TokenizerError> {
        // Ids are 32 bits wide in every file, so that there are no more tokens than that.
        let ordinary = parts.tokens.len() as u32;
        let mut unused = parts.unused;
        let declared: BTreeSet<u32> = parts.declared.keys().copied().collect();
        let specials = Specials::new(path, ordinary, parts.declared, &parts.text)?;
        if !parts.reserves {
            unused.extend((ordinary..specials.end()).filter(|id| !declared.contains(id)));
        }
        unused.sort_unstable();
        eos.extend(stops.iter().filter_map(|name| specials.id(name)));
        let (tokens, splitter, bpe) = (parts.tokens, parts.splitter, parts.bpe);
        let by_ranks = parts.by_ranks;
        Ok(Tokenizer {
            longest: tokens
                .iter()
                .map(|token| token.len())
                .max()
                .unwrap_or(1)
                .max(1),
            tokens,
            specials,
            alphabet,
            splitter,
            bpe,
            eos,
            unused,
            by_ranks,
        })
    }

    /// Fits the tokenizer to an embedding of `rows` rows. Special tokens past the last row lose their ids: their names
    /// become ordinary text, and they are no longer tokens. Rows past the last token get reserved names, and are unused.
    ///
    /// # Errors
    /// Fewer rows than ordinary tokens.
    pub fn limit_ids(&mut self, rows: usize) -> Result<(), TokenizerError> {
        match u32::try_from(rows) {
            Ok(limit) if rows >= self.tokens.len() => {
                self.unused.retain(|id| *id < limit);
                self.unused.extend(self.specials.end()..limit);
                self.specials.limit(limit)
            }
            _ => Err(TokenizerError::EmbeddingTooSmall {
                rows,
                ordinary: self.tokens.len(),
            }),
        }
    }

    /// The ids of a text without special tokens: the result has no control token, whatever the text contains. Added tokens
    /// that are declared as not special are text, and are encoded as their ids.
    ///
    /// # Errors
    /// A split pattern (other than the published one) that gives up on the text.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.encode_at_most(text, usize::MAX)
    }

    /// The ids of a text as [`Tokenizer::encode_ordinary`] has them, given up as soon as they are certain to be more than
    /// `most`: a text that cannot fit a context is not encoded to its end.
    ///
    /// # Errors
    /// [`TokenizerError::TooManyTokens`], and as for [`Tokenizer::encode_ordinary`].
    pub fn encode_at_most(&self, text: &str, most: usize) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity((text.len() / 3).min(most.saturating_add(1)));
        let mut done = 0;
        while let Some((start, end, id)) = self.specials.find_text(text, done)? {
            self.encode_plain(&text[done..start], most, &mut ids)?;
            ids.push(id);
            done = end;
        }
        self.encode_plain(&text[done..], most, &mut ids)?;
        match ids.len() > most {
            true => Err(TokenizerError::TooManyTokens { most }),
            false => Ok(ids),
        }
    }

    /// The ids of a text, control tokens that it spells among them.
    ///
    /// # Errors
    /// As for [`Tokenizer::encode_at_most`].
    pub fn encode_with_special(&self, text: &str, most: usize) -> Result<Vec<u32>, TokenizerError> {
        let (mut ids, mut done) = (Vec::new(), 0);
        while let Some((start, end, id)) = self.specials.find(text, done)? {
            let left = most.saturating_sub(ids.len());
            ids.extend(self.encode_at_most(&text[done..start], left)?);
            ids.push(id);
            done = end;
        }
        let left = most.saturating_sub(ids.len());
        ids.extend(self.encode_at_most(&text[done..], left)?);
        Ok(ids)
    }

    /// Adds the ids of a text without any added token.
    fn encode_plain(
        &self,
        text: &str,
        most: usize,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut chars = String::new();
        self.splitter.split(text, &mut |piece| {
            // No token has more bytes than the longest one.
            if ids.len() + piece.len() / self.longest > most {
                return Err(TokenizerError::TooManyTokens { most });
            }
            chars.clear();
            self.alphabet.write(piece.as_bytes(), &mut chars);
            let tokens = self
                .bpe
                .tokenize(&chars)
                .map_err(|e| model_error("a piece of text", &*e))?;
            ids.extend(tokens.iter().map(|token| token.id));
            Ok(())
        })
    }

    /// The bytes of these tokens, one after the other; a special token's bytes are its name's.
    ///
    /// # Errors
    /// An id that is not a token.
    pub fn decode_bytes(&self, ids: &[u32]) -> Result<Vec<u8>, TokenizerError> {
        let mut out = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            out.extend_from_slice(self.known(id)?.bytes);
        }
        Ok(out)
    }

    /// The text of these tokens, U+FFFD for bytes that are no character.
    ///
    /// # Errors
    /// An id that is not a token.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        Ok(String::from_utf8_lossy(&self.decode_bytes(ids)?).into_owned())
    }

    /// The token with this id, if there is one.
    pub fn piece(&self, id: u32) -> Option<Piece<'_>> {
        if let Some(bytes) = self.tokens.get(id as usize) {
            return Some(Piece { bytes, name: None });
        }
        self.specials.name(id).map(|name| Piece {
            bytes: name.as_bytes(),
            name: (!self.specials.is_text(id)).then_some(name),
        })
    }

    fn known(&self, id: u32) -> Result<Piece<'_>, TokenizerError> {
        let last = self.specials.end().saturating_sub(1);
        self.piece(id).ok_or(TokenizerError::UnknownId { id, last })
    }

    /// A decoder for one sequence of ids as they come.
    pub fn stream(&self) -> StreamDecoder<&Tokenizer> {
        StreamDecoder::new(self)
    }

    /// The vocabulary as a GGUF holds it.
    ///
    /// # Errors
    /// [`TokenizerError::NotByRanks`]: a `tokenizer.json` whose pattern or merges a GGUF of kimi-linear cannot say.
    pub fn to_gguf(&self) -> Result<Vocabulary, TokenizerError> {
        gguf::write(self)
    }

    /// The number of ordinary tokens; the special ones follow them.
    pub fn ordinary_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// One past the last id.
    pub fn vocab_size(&self) -> usize {
        self.specials.end() as usize
    }

    /// The id of the special token with this name, if it has one.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.specials.id(name)
    }

    /// Whether this id is a control token's: an added token that is declared as not special is text.
    pub fn is_special(&self, id: u32) -> bool {
        self.specials.name(id).is_some() && !self.specials.is_text(id)
    }

    /// The special tokens, reserved ones and those that are text included, by id.
    pub fn special_tokens(&self) -> impl Iterator<Item = (u32, &str)> {
        self.specials.iter()
    }

    /// Ids that only the embedding has rows for: those that a GGUF marks as unused (`[PADn]`), that no file names, or that
    /// follow the last token. They must never be sampled. Ascending.
    pub fn unused_ids(&self) -> &[u32] {
        &self.unused
    }

    /// The ids at which an answer ends, as far as the tokenizer's own files say: `eos_token_id` of
    /// `generation_config.json`, `eos_token` of `tokenizer_config.json`, `[EOS]` and `<|im_end|>`. Ascending.
    pub fn eos_ids(&self) -> Vec<u32> {
        self.stop_ids(&[])
    }

    /// [`Tokenizer::eos_ids`] and those of `config.json`, without those that are no token. Ascending.
    pub fn stop_ids(&self, configured: &[u32]) -> Vec<u32> {
        let mut ids: Vec<u32> = self.eos.iter().chain(configured).copied().collect();
        ids.retain(|&id| (id as usize) < self.vocab_size());
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// A byte-pair model from the ranks of `tiktoken.model`.
fn from_ranks(path: &Path, text: &[u8], alphabet: &Alphabet) -> Result<Parts, TokenizerError> {
    from_tokens(path, ranks::parse(path, text)?, alphabet)
}

/// A byte-pair model from tokens by rank; `path` is for messages.
fn from_tokens(
    path: &Path,
    tokens: Vec<Box<[u8]>>,
    alphabet: &Alphabet,
) -> Result<Parts, TokenizerError> {
    let merges: Vec<_> = merges(path, &tokens, alphabet)?;
    let vocab: Vocab = (0..)
        .zip(&tokens)
        .map(|(id, token)| (alphabet.text(token), id))
        .collect();
    let bpe = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(true)
        .build()
        .map_err(|e| model_error("the ranks", &*e))?;
    Ok(Parts {
        tokens,
        bpe,
        splitter: Splitter::new([split::PATTERN])?,
        declared: BTreeMap::new(),
        text: BTreeSet::new(),
        unused: Vec::new(),
        reserves: true,
        by_ranks: true,
    })
}

/// The merges that follow from the order of the tokens.
fn merges(
    path: &Path,
    tokens: &[Box<[u8]>],
    alphabet: &Alphabet,
) -> Result<Vec<(String, String)>, TokenizerError> {
    let index = ranks::index(path, tokens)?;
    let merges = tokens.iter().filter_map(|token| {
        let (left, right) = token.split_at(ranks::last_join(token, &index)?);
        Some((alphabet.text(left), alphabet.text(right)))
    });
    Ok(merges.collect())
}

fn model_error(
    what: &'static str,
    error: &(dyn std::error::Error + Send + Sync),
) -> TokenizerError {
    TokenizerError::Model {
        what,
        reason: error.to_string(),
    }
}
