# cmake -DIN=set.bin -DOUT=set.c -DNAME=tm_descriptor_set -P embed.cmake: a binary file as a C array.
file(READ ${IN} hex HEX)
string(LENGTH "${hex}" digits)
math(EXPR bytes "${digits} / 2")
string(REGEX REPLACE "([0-9a-f][0-9a-f])" "0x\\1," body "${hex}")
set(pair "0x..,0x..,0x..,0x..,")
string(REGEX REPLACE "(${pair}${pair}${pair}${pair})" "\\1\n" body "${body}")
file(WRITE ${OUT} "#include \"proto/descriptor_set.h\"\n\nconst unsigned char ${NAME}[] = {\n${body}\n};\nconst unsigned long ${NAME}_len = ${bytes};\n")
