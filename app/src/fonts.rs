//! System fonts for the scripts that the built-in fonts lack: Chinese, Japanese, Korean, Arabic and so on.
//!
//! They are loaded in the background. A thread searches the system's fonts for a character that no loaded font has, and adds
//! the font that has it; until then, and if there is none, a box is drawn.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use eframe::egui::{self, FontData, FontFamily, FontInsert, FontPriority, FontTweak};
use fontdb::{Database, FaceInfo, Style};
use skrifa::{FontRef, MetadataProvider};

/// Makes the context search the system's fonts for characters that its own lack.
pub fn follow(ctx: &egui::Context) {
    let (missing, asked) = mpsc::channel();
    let there = ctx.clone();
    let spawned = std::thread::Builder::new()
        .name("fonts".to_owned())
        .spawn(move || serve(&there, &asked));
    match spawned {
        Ok(_) => ctx.add_font_provider(Arc::new(Missing(missing))),
        Err(error) => tracing::error!("the system gives no thread: {error}"),
    }
}

/// Collects missing characters; it has no fonts itself.
struct Missing(Sender<char>);

impl egui::FontProvider for Missing {
    fn font_for(&self, request: &egui::FallbackRequest<'_>) -> Option<FontInsert> {
        if let Some(character) = request.cluster.chars().next() {
            // The thread ends with the window.
            let _ = self.0.send(character);
        }
        None
    }
}

/// Finds a font for each requested character, once.
fn serve(ctx: &egui::Context, asked: &Receiver<char>) {
    let mut seen = BTreeSet::new();
    let mut fonts = None;
    while let Ok(first) = asked.recv() {
        let more = std::iter::once(first).chain(asked.try_iter());
        let mut wanted: BTreeSet<char> = more.filter(|character| seen.insert(*character)).collect();
        if wanted.is_empty() {
            continue;
        }
        // The font folders are scanned for the first missing character.
        let fonts = fonts.get_or_insert_with(Fonts::of_the_system);
        while let Some(character) = wanted.pop_first() {
            let Some(found) = fonts.find(character) else {
                tracing::info!("no font of the system has {character:?}: a box stands for it");
                continue;
            };
            tracing::info!("{} for {character:?} and others", found.name);
            wanted
                .retain(|other| !has(found.font.font.as_ref().as_ref(), found.font.index, *other));
            let family = |family| egui::epaint::text::InsertFontFamily {
                family,
                priority: FontPriority::Lowest,
            };
            ctx.add_font(FontInsert {
                name: found.name,
                data: found.font,
                families: vec![
                    family(FontFamily::Proportional),
                    family(FontFamily::Monospace),
                ],
            });
            ctx.request_repaint();
        }
    }
}

/// Whether a face can draw a character: picture fonts have no outlines.
fn has(data: &[u8], index: u32, character: char) -> bool {
    let Ok(font) = FontRef::from_index(data, index) else {
        return false;
    };
    let glyph = font.charmap().map(character);
    glyph.is_some_and(|glyph| font.outline_glyphs().get(glyph).is_some())
}

/// A face with its file.
struct Found {
    name: String,
    font: FontData,
}

/// The fonts of the system, those that suit the interface first.
struct Fonts {
    database: Database,
    order: Vec<fontdb::ID>,
}

impl Fonts {
    fn of_the_system() -> Self {
        let mut database = Database::new();
        database.load_system_fonts();
        let language = ["LC_ALL", "LC_CTYPE", "LANG"].iter();
        let language = language.filter_map(|name| std::env::var(name).ok());
        let language = language.into_iter().find(|value| !value.is_empty());
        Self::new(database, &language.unwrap_or_default())
    }

    fn new(database: Database, language: &str) -> Self {
        let form = han(language);
        let mut faces: Vec<&FaceInfo> = database.faces().collect();
        faces.sort_by_cached_key(|face| rank(face, form));
        let order = faces.iter().map(|face| face.id).collect();
        Self { database, order }
    }

    /// The first face with a character.
    fn find(&self, character: char) -> Option<Found> {
        let has = |id: &&fontdb::ID| {
            let found = self
                .database
                .with_face_data(**id, |data, index| has(data, index, character));
            found.unwrap_or(false)
        };
        let id = *self.order.iter().find(has)?;
        let name = self.database.face(id)?.post_script_name.clone();
        let font = self.database.with_face_data(id, |data, index| FontData {
            font: Arc::new(data.to_vec()),
            index,
            tweak: FontTweak::default(),
        });
        font.map(|font| Found { name, font })
    }
}

/// The variant of Chinese characters for a language, as it appears in names of fonts.
fn han(language: &str) -> &'static str {
    let forms = [("ja", "JP"), ("ko", "KR"), ("zh_TW", "TC"), ("zh_HK", "HK")];
    let form = forms
        .iter()
        .find(|(prefix, _)| language.starts_with(prefix));
    form.map_or("SC", |(_, form)| form)
}

/// The rank of a face: upright, of regular weight and width, without serifs, and of the language's variant first.
fn rank(face: &FaceInfo, form: &str) -> impl Ord + use<> {
    let name = face.families.first().map_or("", |(name, _)| name.as_str());
    let serif = ["Serif", "Ming", "Song", "Mincho", "Batang"]
        .iter()
        .any(|word| name.contains(word));
    let other_form = name.contains("CJK") && !name.split(' ').any(|word| word == form);
    (
        face.style != Style::Normal,
        face.weight.0.abs_diff(400),
        face.stretch != fontdb::Stretch::Normal,
        face.monospaced,
        serif,
        other_form,
        name.to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::{Fonts, han};
    use eframe::egui::FontDefinitions;
    use fontdb::Database;

    fn fonts() -> Fonts {
        let mut database = Database::new();
        for name in ["Hack", "Ubuntu-Light"] {
            let font = &FontDefinitions::default().font_data[name];
            database.load_font_data(font.font.as_ref().as_ref().to_vec());
        }
        Fonts::new(database, "de_DE.UTF-8")
    }

    #[test]
    fn a_font_is_found_by_what_it_has() {
        let fonts = fonts();
        // Box drawing is only in the font for code, a schwa only in the other one.
        assert!(fonts.find('╬').unwrap().name.contains("Hack"));
        assert!(fonts.find('Ə').unwrap().name.contains("Ubuntu"));
        assert!(fonts.find('中').is_none());
    }

    #[test]
    fn chinese_characters_have_the_form_of_the_language() {
        let forms = ["ja_JP.UTF-8", "ko_KR", "zh_TW", "zh_CN.UTF-8", "C", ""].map(han);
        assert_eq!(forms, ["JP", "KR", "TC", "SC", "SC", "SC"]);
    }
}
