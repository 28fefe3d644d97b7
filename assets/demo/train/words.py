"""The words of the demo model's world, and small helpers to draw from them."""

PEOPLE = ("Anna Ben Carl Dora Emma Finn Greta Hugo Ida Jack Kate Leo Mary Nina Oscar Paul Rosa Sam Tom Alice Bob "
          "John Eve Max").split()
PLACES = ("kitchen garden hall office cellar attic bathroom bedroom garage park school shop library station barn "
          "tower").split()
THINGS = ("apple key lamp ball book cup coin hat map pen ring rope shoe spoon stone watch knife letter bottle egg "
          "orange umbrella candle bell flower toy brush card pear fork").split()
COLOURS = "red blue green yellow black white pink brown grey purple".split()
CONTAINERS = "box bag jar drawer basket chest bucket pot".split()
COLOURED = "door car house wall chair table boat bike fence flag".split()
LABELS = "code password answer number total score".split()
NUMBERS = [str(i) for i in range(100)]
LETTERS = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z".split()

DISTRACTORS = [
    "The sky is clear.", "It is Monday.", "The dog sleeps.", "It rains today.", "The cat looks out.",
    "The sun is warm.", "A bird sings.", "It is late.", "The wind is cold.", "The music is loud.",
    "The train is late.", "The clock ticks.", "It is quiet here.", "The soup is hot.",
]


WHOLE = {id(words): list(words) for words in (PEOPLE, PLACES, THINGS, COLOURS, CONTAINERS, COLOURED, LABELS, NUMBERS, LETTERS)}


def narrow(share):
    """Keep only the first `share` of each list, and ten at least: a smaller world to begin with."""
    for words in (PEOPLE, PLACES, THINGS, COLOURS, CONTAINERS, COLOURED, LABELS, NUMBERS, LETTERS):
        whole = WHOLE[id(words)]
        words[:] = whole[:max(10, round(share * len(whole)))]


def a(noun):
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def upper_first(text):
    return text[0].upper() + text[1:]


def listing(items):
    """`x`, `x and y`, `x, y and z`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
