"""Tracking: people move, take things, drop them, hand them over; then where is who or what, and who has what."""
from facts import BEFORE, CALCULATE, UNKNOWN, WHY, split
from phrases import FIX, question, statement
from words import *

GO = split("""goes to|moves to|walks to|went to|runs to|enters|travels to|hurries to|flies to|climbs to|jumps into|marches to|wanders to|rides to
rushes to|comes to|moved to|walked to|ran to|hurried to|travelled to|came to|steps into|stepped into|sneaks into|goes into|went into
is back in|returns to|returned to|arrives in|gets to|visits|heads to|headed to|moves into|slips into|races to|is off to|crawls to
dances into|appears in|shows up in|has gone to|moves over to|goes back to|went back to|walks into|makes for|turns up in|flees to|is now in
is in|is in|is in|is at|stays in|is standing in|was seen in|works in|rests in""")
ARRIVE = split("""{p} {g} the {l}.|{p} {g} the {l}.|{p} {g} the {l}.|{p} is in the {l}.|{p} is in the {l}.|In the {l} there is {p}.|{p}: {l}.
You find {p} in the {l}.|We see {p} in the {l}.|I saw {p} in the {l}.|{p} has arrived in the {l}.|I left {p} in the {l}.
{p} came from the {o} to the {l}.|The {l} is where {p} is.|{p} sleeps in the {l}.|{p} and a dog are in the {l}.""")
AGAIN = split("""{p} {g} the {l}.|{p} {g} the {l}.|{p} {g} the {l}.|{p} {g} the {l}.|{p} goes back to the {l}.|Then {p} {g} the {l}.
Now {p} is in the {l}.|{p} leaves the {h} for the {l}.|{p} leaves the {h} and {g} the {l}.|{p} goes from the {h} to the {l}.
After that {p} {g} the {l}.|Next {p} {g} the {l}.|{p} is not in the {h} but in the {l}.|Later {p} {g} the {l}.
{p} moved from the {h} to the {l}.|{p} is called to the {l}.|I send {p} to the {l}.|Finally {p} {g} the {l}.|Actually, {p} is in the {l}.
{p} was in the {h} and now is in the {l}.""")
TAKE = split("""{p} takes {t}.|{p} takes {t}.|{p} picks up {t}.|{p} picks {t} up.|{p} grabs {t}.|{p} gets {t}.|{p} took {t}.|{p} has {t}.
{p} has {t}.|{p} holds {t}.|{p} carries {t}.|{p} has got {t}.|{p} picked up {t}.|{p} got {t}.|{p} steals {t}.|{p} collects {t}.|{p} lifts {t}.
{p} finds {t}.|{p} is holding {t}.|{p} seizes {t}.|{p} catches {t}.|{p} receives {t}.|{p} brings {t}.|{p} keeps {t}.|{p} buys {t}.
{p} bought {t}.|{p} snatches {t}.|I give {t} to {p}.|I give {p} {t}.|{p} now has {t}.|{p} carries {t} around.|{p} is carrying {t}.
{p} grabbed {t}.""")
DROP = split("""{p} drops {t}.|{p} puts down {t}.|{p} leaves {t}.|{p} puts {t} down.|{p} dropped {t}.|{p} leaves {t} here.|{p} lets go of {t}.
{p} left {t} behind.|{p} loses {t}.|{p} lays down {t}.|{p} throws {t} away.|{p} discards {t}.|{p} releases {t}.|{p} sets {t} down.
{p} places {t} on the floor.|{p} puts {t} on the ground.|{p} put down {t}.|{p} no longer has {t}.""")
DROP_IN = split("""{p} drops {t} in the {l}.|{p} leaves {t} in the {l}.|{p} puts {t} down in the {l}.|{p} left {t} in the {l}.
In the {l}, {p} puts down {t}.|{p} forgets {t} in the {l}.""")
GIVE = split("""{p} gives {t} to {r}.|{p} hands {t} to {r}.|{p} gives {r} {t}.|{p} passes {t} to {r}.|{p} gave {t} to {r}.
{p} hands {t} over to {r}.|{r} gets {t} from {p}.|{p} throws {t} to {r}.|{r} takes {t} from {p}.|{p} gave {r} {t}.|{p} passed {t} to {r}.
{p} sells {t} to {r}.|{p} hands {r} {t}.|{r} receives {t} from {p}.|{p} lends {t} to {r}.|{r} took {t} from {p}.|{p} offers {r} {t}.""")
BRING = split("""{p} takes {t} to the {l}.|{p} brings {t} to the {l}.|{p} carries {t} to the {l}.|{p} takes {t} and goes to the {l}.
With {t}, {p} {g} the {l}.|{p} {g} the {l} with {t}.|{p} picks up {t} and {g} the {l}.|{p} moves {t} to the {l}.
{p} grabs {t} and runs to the {l}.|{p} took {t} with him to the {l}.|{p} got {t} and walked to the {l}.""")
LIES = split("""The {n} is in the {l}.|There is a {n} in the {l}.|The {n} lies in the {l}.|A {n} is in the {l}.|I put the {n} in the {l}.
I left the {n} in the {l}.|Someone left the {n} in the {l}.|The {n} was left in the {l}.|In the {l} there is a {n}.|In the {l} is the {n}.
I see the {n} in the {l}.|The {n} stands in the {l}.""")
WHERE_PERSON = split("""Where is {p}?|Where is {p}?|Where is {p}?|Where is {p} now?|Where's {p}?|Which room is {p} in?|Which place is {p} in?
Where did {p} go?|Where was {p} last?|Where can I find {p}?|Where does {p} stay?|And {p}?|Where do I find {p}?|Where has {p} been seen?
In which room is {p}?|{p} is where?|What place is {p} at?|Where has {p} gone to?|Find {p}.|Where went {p}?|Where can I meet {p}?
Where did {p} end?|To which place did {p} go?|Where should I look for {p}?|Locate {p}.|Where is {p} located?|Where would {p} be?
What about {p}?|Where are you, {p}?|Where must {p} be?|Where do you think {p} is?|Where did I see {p}?|The place of {p}?|Where is {p} hiding?
Where is {p} sitting?""")
INDIRECT_PERSON = split("""where {p} is|where {p} went|which room {p} is in|where I can find {p}|where to find {p}|where {p} has gone
where {p} is now|the place where {p} is""")
WHERE_THING = split("""Where is the {t}?|Where is the {t}?|Where is the {t}?|Where is the {t} now?|Where's the {t}?|Where can I find the {t}?
Where did the {t} go?|Which room is the {t} in?|Where do I find the {t}?|And the {t}?|In which room is the {t}?|Where was the {t} left?
Where should I look for the {t}?|Find the {t}.|Where lies the {t}?|Where has the {t} gone?|Where is my {t}?|Where is the {t} kept?
What about the {t}?|The {t} is where?|Where must the {t} be?|Locate the {t}.|Where did the {t} end?|What happened to the {t}?
Where would the {t} be?|Where was the {t} put?|Where can the {t} be?|Where is the {t} lying?""")
INDIRECT_THING = split("""where the {t} is|where the {t} went|where I can find the {t}|where to find the {t}|which room the {t} is in
where the {t} has gone|where the {t} lies""")
WHO = split("""Who has the {t}?|Who has the {t}?|Who has the {t}?|Who has the {t} now?|Who holds the {t}?|Who is holding the {t}?
Who carries the {t}?|Who has got the {t}?|Who took the {t}?|Who is carrying the {t}?|Who's holding the {t}?|Who keeps the {t}?
Who got the {t}?|With whom is the {t}?|Who has my {t}?|Which person has the {t}?|Who's got hold of the {t}?|Whose hands hold the {t}?
Whom do I ask for the {t}?|Who ended up with the {t}?|Who now has the {t}?|By whom is the {t} held?|Does someone have the {t}?
Does anyone have the {t}?""")
INDIRECT_WHO = split("who has the {t}|who holds the {t}|who is holding the {t}|who took the {t}|who carries the {t}|who got the {t}")
WHAT = split("""What does {p} have?|What does {p} have?|What does {p} have?|What does {p} hold?|What is {p} holding?|What is {p} carrying?
What does {p} carry?|What has {p}?|What did {p} take?|Which things does {p} have?|What do you know that {p} has?|What is in {p}'s hands?
What does {p} own?|What does {p} have now?|What did {p} get?|What things has {p}?|What did {p} pick up?|What is with {p}?|What does {p} keep?
Does {p} have anything?|Is {p} holding anything?|Which thing is {p} carrying?|Does {p} hold something?|What's {p} holding?
What's {p} carrying?""")
INDIRECT_WHAT = split("what {p} has|what {p} holds|what {p} is holding|what {p} carries|which things {p} has|what {p} is carrying|what {p} took")
WHO_IN = split("""Who is in the {l}?|Who is in the {l}?|Who's in the {l}?|Is anyone in the {l}?|Which person is in the {l}?
Who can be found in the {l}?|Is somebody in the {l}?|Who is at the {l}?""")
WHETHER = split("Is {p} in the {o}?|Is {p} still in the {o}?|{p} is in the {o}, right?|Did {p} go to the {o}?|Has {p} gone to the {o}?")
FIX_PERSON = split("""No, {p}.|I mean {p}.|Sorry, {p}.|sorry, {p}|It was {p}.|No, it was {p}.|Not {w} but {p}.|{p}, not {w}.
I meant {p}, not {w}.|Wait, {p}.|Actually, {p}.|Correction: {p}.""")
IMPOSSIBLE = [("How many people are in the {l}?", CALCULATE), ("How many people are there?", CALCULATE), ("Why is {p} in the {l}?", WHY),
              ("Where was {p} before?", BEFORE),
              ("How many things does {p} have?", CALCULATE), ("Why did {p} go there?", WHY), ("When did {p} go there?", WHY.replace("why", "when")),
              ("Where was {p} at first?", BEFORE), ("How far is the {l} from here?", UNKNOWN),
              ("Is {p} happy?", UNKNOWN), ("What is {p} doing?", UNKNOWN),
              ("How many rooms are there?", CALCULATE), ("Who was in the {l} before?", BEFORE), ("Where will {p} go next?", UNKNOWN)]


class World:
    """People and things in places; one event a statement."""

    def __init__(self, rng, n, unknown=0.0):
        self.rng, self.statements, self.unknown, self.note = rng, n, unknown, None
        self.people = several(person, rng, rng.randint(1, min(5, max(1, n // 2))) + 1)
        self.stranger = self.people.pop()
        self.places = several(place, rng, rng.randint(2, 6))
        self.things = several(thing, rng, rng.randint(1, min(6, max(1, n // 2))) + 1)
        self.lost = self.things.pop()
        self.at, self.holder, self.lies = {}, {}, {}
        self.possessions = rng.random() < 0.15  # people who have things, and no places
        self.fixes = rng.choice([0, 0.1, 0.3])
        self.fixed, self.form = rng.random() < 0.2, {}
        self.hero = self.object = None  # whom `she` and what `it` would mean
        self.event = None

    def wording(self, forms):
        """One wording throughout in some worlds, a new one for each event in others."""
        key = id(forms)
        if not self.fixed or key not in self.form:
            self.form[key] = self.rng.choice(forms)
        return self.form[key]

    def tell(self, forms, person, thing="", place="", other="", home=""):
        """The sentence; whom or what the last one was about may be a pronoun."""
        rng = self.rng
        form = self.wording(forms)
        who, what = person, thing and ("the " + thing if rng.random() < 0.85 else a(thing))
        if person == self.hero and form.startswith("{p}") and rng.random() < 0.25:
            who = rng.choice(["She", "He", "She", "He", "Then she", "Then he"])
        if thing and thing == self.object and rng.random() < 0.25:
            what = "it"
            form = form.replace("{r} {t}", "{t} to {r}") if forms is GIVE else form.replace("up {t}", "{t} up").replace("down {t}", "{t} down")
        self.hero, self.object = other or person, thing or None
        away = rng.choice([l for l in self.places if l != place] or ["street"])
        goes = rng.choice(GO) if rng.random() < 0.93 else made_up(rng) + rng.choice(["s to", "ed to", "s into", "s in"])
        text = form.format(p=who, t=what, n=thing, l=place, g=goes, r=other, h=home or away, o=away)
        return statement(rng, upper_first(text))

    def held(self, person):
        return [t for t, p in self.holder.items() if p == person]

    def say(self):
        rng = self.rng
        if self.event and rng.random() < self.fixes:
            return self.fix()
        self.event = None
        if self.possessions:
            return self.give_or_take(rng.choice(self.people))
        here, absent = list(self.at), [p for p in self.people if p not in self.at]
        kinds = ["arrive"] * 3 * bool(absent) + (["move"] * 3 + ["take"] * 3 + ["drop"] * 2 + ["give"] * 2 + ["bring"] + ["lies"]) * bool(here)
        kind = rng.choice(kinds)
        if kind == "arrive":
            self.at[absent[0]] = place = rng.choice(self.places)
            self.event = ("arrive", absent[0])
            return self.tell(ARRIVE, absent[0], place=place)
        if kind == "lies":
            return self.lay()
        person = self.hero if self.hero in self.at and rng.random() < 0.3 else rng.choice(here)
        if kind == "move":
            home = self.at[person]
            self.at[person] = rng.choice([l for l in self.places if l != home])
            self.event = ("move", person)
            return self.tell(AGAIN, person, place=self.at[person], home=home)
        if kind == "bring":
            return self.bring(person)
        return self.give_or_take(person)

    def free(self, person):
        """What the person can take: what nobody has, and lies in the same place if that is known."""
        if len(self.held(person)) >= 3:
            return []
        return [t for t in self.things if t not in self.holder and (t not in self.lies or self.lies[t] == self.at.get(person))]

    def give_or_take(self, person):
        rng = self.rng
        mine, free = self.held(person), self.free(person)
        kind = rng.choice(["take"] * 3 * bool(free) + (["drop"] * 2 + ["give"] * 2) * bool(mine) + ["noise"])
        if kind == "take":
            return self.take(person, free)
        thing = rng.choice(mine) if mine else None
        others = [p for p in (self.people if self.possessions else self.at) if p != person and len(self.held(p)) < 3]
        if kind == "give" and others:
            other = self.holder[thing] = rng.choice(others)
            return self.tell(GIVE, person, thing, other=other)
        if kind == "drop" and not self.possessions:
            del self.holder[thing]
            self.lies[thing] = self.at[person]
            return self.tell(DROP if rng.random() < 0.7 else DROP_IN, person, thing, place=self.at[person])
        return rng.choice(DISTRACTORS) if rng.random() < 0.3 else self.say()

    def take(self, person, free):
        """One thing, or two at once."""
        two = len(free) > 1 and len(self.held(person)) < 2 and self.rng.random() < 0.12
        things = self.rng.sample(free, 1 + two)
        for thing in things:
            self.lies.pop(thing, None)
            self.holder[thing] = person
        if not two:
            return self.tell(TAKE, person, things[0])
        self.object = None
        text = self.tell(TAKE, person, " and the ".join(things))
        self.object = None
        return text

    def bring(self, person):
        things = self.held(person) + self.free(person)
        if not things:
            return self.say()
        thing = self.rng.choice(things)
        self.lies.pop(thing, None)
        self.holder[thing] = person
        self.at[person] = place = self.rng.choice([l for l in self.places if l != self.at[person]])
        return self.tell(BRING, person, thing, place=place)

    def lay(self):
        things = [t for t in self.things if t not in self.holder]
        if not things:
            return self.say()
        thing = self.rng.choice(things)
        self.lies[thing] = place = self.rng.choice(self.places)
        text = self.rng.choice(LIES).format(n=thing, l=place).replace("a " + thing, a(thing)).replace("A " + thing, upper_first(a(thing)))
        self.hero = self.object = None
        return statement(self.rng, text)

    def fix(self):
        """The last arrival or move was to another place, or another person's."""
        rng, (kind, person) = self.rng, self.event
        absent = [p for p in self.people if p not in self.at]
        self.object, old = None, self.at[person]
        if kind == "arrive" and absent and rng.random() < 0.3:
            del self.at[person]
            self.at[absent[0]] = old
            self.event, self.hero = ("arrive", absent[0]), absent[0]
            for thing in self.held(person):
                del self.holder[thing]
            return rng.choice(FIX_PERSON).format(p=absent[0], w=person)
        self.at[person] = rng.choice([l for l in self.places if l != old])
        return upper_first(rng.choice(FIX).format(v="the " + self.at[person], w="the " + old))

    def ask(self):
        rng = self.rng
        self.event = self.hero = self.object = None
        seen = [*self.holder, *self.lies]
        unknown = rng.random() < self.unknown or not seen and not self.at
        if not unknown and self.at and rng.random() < 0.06:
            form, answer = rng.choice(IMPOSSIBLE)
            person = rng.choice(list(self.at))
            return question(rng, [form.format(p=person, l=self.at[person])]), answer
        kind = rng.choices(["person", "thing", "who", "what", "who in", "whether"],
                           [3 * (unknown or bool(self.at)), 4 * (unknown or bool(seen)), 3 * (unknown or bool(seen)), 2.5,
                            0.3 * bool(self.at), 0.3 * bool(self.at)])[0]
        if kind in ("who in", "whether"):
            return self.ask_place(kind)
        if kind in ("person", "what"):
            people = list(self.at) if kind == "person" else [*self.at, *set(self.holder.values()) - set(self.at)]
            if not people:
                unknown = True
            return self.ask_person(kind, self.stranger if unknown else rng.choice(sorted(people)), unknown)
        return self.ask_thing(kind, self.lost if unknown else rng.choice(seen), unknown)

    def ask_place(self, kind):
        rng, person = self.rng, self.rng.choice(list(self.at))
        place = self.at[person]
        if kind == "whether":
            asked = place if rng.random() < 0.5 else rng.choice(self.places)
            return question(rng, [f.format(p=person, o=asked) for f in WHETHER]), f"{person} is in the {place}."
        there = [p for p in self.at if self.at[p] == place]
        return question(rng, [f.format(l=place) for f in WHO_IN]), f"{listing(there)} {'is' if len(there) == 1 else 'are'} in the {place}."

    def ask_person(self, kind, person, unknown):
        direct, indirect = (WHERE_PERSON, INDIRECT_PERSON) if kind == "person" else (WHAT, INDIRECT_WHAT)
        asked = question(self.rng, [f.format(p=person) for f in direct], [f.format(p=person) for f in indirect])
        if unknown:
            return asked, f"I don't know where {person} is." if kind == "person" else f"I don't know what {person} has."
        if kind == "person":
            return asked, f"{person} is in the {self.at[person]}."
        held = [f"the {t}" for t in self.held(person)]
        return asked, f"{person} has {listing(held) if held else 'nothing'}."

    def ask_thing(self, kind, thing, unknown):
        direct, indirect = (WHO, INDIRECT_WHO) if kind == "who" else (WHERE_THING, INDIRECT_THING)
        asked = question(self.rng, [upper_first(f.format(t=thing)) for f in direct], [f.format(t=thing) for f in indirect])
        if unknown:
            return asked, f"I don't know who has the {thing}." if kind == "who" else f"I don't know where the {thing} is."
        person = self.holder.get(thing)
        if kind == "who":
            return asked, f"{person or 'Nobody'} has the {thing}."
        if not person:
            return asked, f"The {thing} is in the {self.lies[thing]}."
        return asked, f"{person} has the {thing} in the {self.at[person]}." if person in self.at else f"{person} has the {thing}."
