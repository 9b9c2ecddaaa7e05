"""The simulated model answers with these words: one token each, with a space before it.

There are 256, so that a byte picks one. The last sixteen are not ASCII: a relay that cuts a stream between
two bytes of a character must still deliver it.
"""

from __future__ import annotations

_TEXT = """
    river stone lantern morning garden window letter bridge harbor silver meadow candle winter summer
    autumn spring forest mountain valley island ocean desert prairie canyon village market castle tower
    temple palace cottage cabin apple orange lemon cherry melon peach plum grape berry walnut almond
    honey butter bread cheese pepper ginger garlic onion carrot tomato potato spinach cabbage pumpkin
    rice barley wheat corn oats bean lentil falcon sparrow robin heron swallow eagle raven pigeon finch
    otter badger rabbit squirrel hedgehog fox wolf horse donkey camel goat sheep cattle turtle lizard
    salmon trout herring dolphin whale beetle cricket butterfly violin cello piano trumpet guitar flute
    drum organ harp choir melody rhythm chorus ballad sonata opera copper iron nickel cobalt marble
    granite amber crystal pearl coral velvet cotton linen silk wool leather hammer anvil chisel needle
    thread ribbon basket barrel bucket kettle mirror saddle anchor compass ladder wagon planet comet
    meteor galaxy orbit eclipse horizon shadow thunder rainbow breeze storm snow frost mist cloud doctor
    teacher farmer sailor painter writer baker miller weaver potter tailor carpenter shepherd hunter
    miner pilot travel wander gather listen answer remember whisper promise wonder follow carry borrow
    mend plant harvest build gentle quiet bright narrow hollow ancient modern simple clever humble
    honest patient steady sudden distant hidden seven eleven twenty hundred thousand first second third
    double single early later always never often seldom north south east west above below beside between
    beyond within around across toward against under over café naïve größe señor crêpe über façade
    jalapeño žluť øre łódź ñandú мир 東京 水 ελιά
"""
WORDS = tuple(_TEXT.split())
