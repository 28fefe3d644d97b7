//! The layout of the panels: tiles that can be dragged, tabbed and split, and are restored at the next start.

use eframe::egui;
use egui_tiles::{Container, Linear, LinearDir, Tile, TileId, Tiles, Tree};
use serde::{Deserialize, Serialize};

use crate::views;

/// A panel.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Pane {
    /// The chat.
    Chat,
    /// A view, by its name.
    View(String),
}

/// Views in the upper tabs initially; all others are below.
const ABOVE: [&str; 3] = ["State", "Layers and heads", "Half-lives"];

fn all(remote: bool) -> Vec<Pane> {
    let mut panes = vec![Pane::Chat];
    if !remote {
        let views = views::all().into_iter();
        panes.extend(views.map(|view| Pane::View(view.name().to_owned())));
    }
    panes
}

/// The initial layout: the chat on the left, the views in two rows of tabs beside it.
#[must_use]
pub fn first(remote: bool) -> Tree<Pane> {
    let mut tiles = Tiles::default();
    let chat = tiles.insert_pane(Pane::Chat);
    let (mut above, mut below) = (Vec::new(), Vec::new());
    for pane in all(remote) {
        if let Pane::View(name) = &pane {
            let upper = ABOVE.contains(&name.as_str());
            let tile = tiles.insert_pane(pane);
            if upper { &mut above } else { &mut below }.push(tile);
        }
    }
    let rows: Vec<TileId> = [above, below]
        .into_iter()
        .filter(|tabs| !tabs.is_empty())
        .map(|tabs| tiles.insert_tab_tile(tabs))
        .collect();
    if rows.is_empty() {
        return Tree::new(egui::Id::unique("panels"), chat, tiles);
    }
    let mut column = Linear::new(LinearDir::Vertical, rows.clone());
    for (row, share) in rows.into_iter().zip([0.58, 0.42]) {
        column.shares.set_share(row, share);
    }
    let views = tiles.insert_container(Container::Linear(column));
    let mut halves = Linear::new(LinearDir::Horizontal, vec![chat, views]);
    halves.shares.set_share(chat, 0.36);
    halves.shares.set_share(views, 0.64);
    let root = tiles.insert_container(Container::Linear(halves));
    Tree::new(egui::Id::unique("panels"), root, tiles)
}

/// Most views per row if all are visible; the first rows have fewer, which are wider.
const ROW: usize = 3;

/// The layout with every panel visible: the chat on the left, the views in rows beside it.
#[must_use]
pub fn side_by_side(remote: bool) -> Tree<Pane> {
    let mut tiles = Tiles::default();
    let chat = tiles.insert_pane(Pane::Chat);
    let mut views: Vec<Pane> = all(remote);
    views.retain(|pane| *pane != Pane::Chat);
    // The widest view is in the first row.
    views.sort_by_key(|pane| *pane != Pane::View(ABOVE[0].to_owned()));
    let views: Vec<TileId> = views
        .into_iter()
        .map(|pane| tiles.insert_pane(pane))
        .collect();
    if views.is_empty() {
        return first(remote);
    }
    let (count, mut rest) = (views.len().div_ceil(ROW), views.as_slice());
    let mut rows = Vec::new();
    for left in (1..=count).rev() {
        let (row, after) = rest.split_at(rest.len() / left);
        rows.push(tiles.insert_horizontal_tile(row.to_vec()));
        rest = after;
    }
    let rows = tiles.insert_vertical_tile(rows);
    let mut halves = Linear::new(LinearDir::Horizontal, vec![chat, rows]);
    halves.shares.set_share(chat, 0.26);
    halves.shares.set_share(rows, 0.74);
    let root = tiles.insert_container(Container::Linear(halves));
    Tree::new(egui::Id::unique("panels"), root, tiles)
}

/// A saved layout, if it has every panel exactly once; that of another version may not.
#[must_use]
pub fn restore(saved: Option<Tree<Pane>>, remote: bool) -> Tree<Pane> {
    let wanted = {
        let mut panes = all(remote);
        panes.sort();
        panes
    };
    let whole = |tree: &Tree<Pane>| {
        let mut panes: Vec<Pane> = tree
            .tiles
            .tiles()
            .filter_map(|tile| match tile {
                Tile::Pane(pane) => Some(pane.clone()),
                Tile::Container(_) => None,
            })
            .collect();
        panes.sort();
        panes == wanted
    };
    saved.filter(whole).unwrap_or_else(|| first(remote))
}

/// Whether a panel is visible: one behind another tab is not computed.
#[must_use]
pub fn visible(tree: &Tree<Pane>, pane: &Pane) -> bool {
    tree.tiles
        .find_pane(pane)
        .is_some_and(|tile| tree.active_tiles().contains(&tile))
}

/// Brings a panel to the front.
pub fn show(tree: &mut Tree<Pane>, pane: &Pane) {
    tree.make_active(|_, tile| matches!(tile, Tile::Pane(other) if other == pane));
}

/// Draws the panels.
pub trait Draw {
    /// Draws a panel.
    fn pane(&mut self, ui: &mut egui::Ui, pane: &Pane);
    /// Draws the right end of a row of tabs: the active panel's help.
    fn beside(&mut self, ui: &mut egui::Ui, active: &Pane);
}

/// Adapter for egui_tiles.
pub struct Behavior<'a>(pub &'a mut dyn Draw);

impl egui_tiles::Behavior<Pane> for Behavior<'_> {
    fn pane_ui(&mut self, ui: &mut egui::Ui, _: TileId, pane: &mut Pane) -> egui_tiles::UiResponse {
        self.0.pane(ui, pane);
        egui_tiles::UiResponse::None
    }

    fn tab_title_for_pane(&mut self, pane: &Pane) -> egui::WidgetText {
        match pane {
            Pane::Chat => "Chat".into(),
            Pane::View(name) => name.as_str().into(),
        }
    }

    fn top_bar_right_ui(
        &mut self,
        tiles: &Tiles<Pane>,
        ui: &mut egui::Ui,
        _: TileId,
        tabs: &egui_tiles::Tabs,
        _: &mut f32,
    ) {
        let active = tabs.active.and_then(|active| tiles.get(active));
        if let Some(Tile::Pane(pane)) = active {
            self.0.beside(ui, pane);
        }
    }

    fn simplification_options(&self) -> egui_tiles::SimplificationOptions {
        egui_tiles::SimplificationOptions {
            all_panes_must_have_tabs: true,
            ..egui_tiles::SimplificationOptions::default()
        }
    }

    fn gap_width(&self, _: &egui::Style) -> f32 {
        4.0
    }
}
